//! Stop texts: texts that end an answer.

/// Finds stop texts in an answer that comes in pieces. It holds back the end of a piece that may be the beginning of one.
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    /// Makes a filter for `stops`; empty ones are ignored.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Takes a piece. Returns the text that is certainly part of the answer, and whether a stop text ended it.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(end) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(end);
            return (std::mem::take(&mut self.held), true);
        }
        let certain = self.held.len() - self.begun();
        let rest = self.held.split_off(certain);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// Returns what was held back, after the last piece.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Returns the number of bytes at the end that may be the beginning of a stop text.
    fn begun(&self) -> usize {
        let held = self.held.as_bytes();
        let begun = |stop: &[u8]| (1..stop.len()).rev().find(|&n| held.ends_with(&stop[..n]));
        let longest = self.stops.iter().filter_map(|stop| begun(stop.as_bytes())).max().unwrap_or(0);
        // A stop text's first bytes may match a part of a character, which stays whole.
        let from = (held.len() - longest..=held.len()).find(|&at| self.held.is_char_boundary(at));
        held.len() - from.unwrap_or(held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(stops: &[&str], pieces: &[&str], want: &[&str], stopped: bool) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.into()).collect();
        let mut filter = StopFilter::new(&stops);
        let mut given = Vec::new();
        for piece in pieces {
            let (text, end) = filter.push(piece);
            given.push(text);
            if end {
                assert!(stopped, "{pieces:?} was stopped");
                assert_eq!(given, want);
                return;
            }
        }
        given.push(filter.finish());
        assert!(!stopped, "{pieces:?} was not stopped");
        assert_eq!(given, want);
    }

    #[test]
    fn an_answer_ends_before_its_first_stop_text() {
        check(&[], &["a", "b"], &["a", "b", ""], false);
        check(&[""], &["a"], &["a", ""], false);
        check(&["END"], &["the END is"], &["the "], true);
        check(&["is", "END"], &["the END is"], &["the "], true);
        check(&["END"], &["the E", "N", "D"], &["the ", "", ""], true);
        check(&["END"], &["the E", "N", "d"], &["the ", "", "ENd", ""], false);
        check(&["END"], &["the EN"], &["the ", "EN"], false);
        check(&["aab"], &["a", "a", "a", "b"], &["", "", "a", ""], true);
        check(&["\n\n", "\nQ:"], &["x\n", "Q", ":"], &["x", "", ""], true);
        check(&["→b"], &["a→", "c"], &["a", "→c", ""], false);
        check(&["é"], &["è", "é"], &["è", ""], true);
    }
}

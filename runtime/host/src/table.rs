//! Tables of one line a row, which fit the width of a terminal.

/// A column of a table.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    /// Whether its cells end in line, as numbers do.
    pub right: bool,
    /// Where the lines are too wide, columns are left out, the one with the highest number first; 0 is never left out.
    pub spare: u8,
}

/// Between two columns.
const GAP: usize = 3;
/// Columns of the terminal that are kept for the last cell, as long as another column can be left out instead.
const LAST_MIN: usize = 30;

/// The lines of a table. In a width, columns are left out until the last one has room, and that is cut where it has not enough.
pub fn lines(columns: &[Column], rows: &[Vec<String>], width: Option<usize>) -> Vec<String> {
    let wide = |at: usize| rows.iter().map(|row| columns_of(&row[at])).max().unwrap_or(0);
    let last = columns.len() - 1;
    // A column that says nothing of any row is none.
    let mut shown: Vec<usize> = (0..last).filter(|at| wide(*at) > 0).collect();
    let before = |shown: &[usize]| shown.iter().map(|at| wide(*at) + GAP).sum::<usize>();
    if let Some(width) = width {
        while before(&shown) + wide(last).min(LAST_MIN) > width {
            let spare = shown.iter().copied().filter(|at| columns[*at].spare > 0);
            let Some(spare) = spare.max_by_key(|at| columns[*at].spare) else { break };
            shown.retain(|at| *at != spare);
        }
    }
    let line = |row: &Vec<String>| {
        let mut line = String::new();
        for at in &shown {
            let pad = " ".repeat(wide(*at) - columns_of(&row[*at]));
            line += &if columns[*at].right { pad + &row[*at] } else { row[*at].clone() + &pad };
            line += &" ".repeat(GAP);
        }
        line += &row[last];
        cut(line.trim_end(), width)
    };
    rows.iter().map(line).collect()
}

/// As much of a text as fits a width, with `…` in the place of the rest.
fn cut(text: &str, width: Option<usize>) -> String {
    let Some(width) = width.filter(|width| *width < columns_of(text)) else { return text.to_owned() };
    let mut left = width.saturating_sub(1);
    let fits = |c: &char| {
        let fits = columns_of_char(*c) <= left;
        left = left.saturating_sub(columns_of_char(*c));
        fits
    };
    text.chars().take_while(fits).chain(['…']).collect()
}

/// Columns of a terminal that a text takes.
fn columns_of(text: &str) -> usize {
    text.chars().map(columns_of_char).sum()
}

/// Two for the letters of East Asia and for pictures.
fn columns_of_char(c: char) -> usize {
    let wide = matches!(
        c,
        '\u{1100}'..='\u{115f}'
            | '\u{2e80}'..='\u{a4cf}'
            | '\u{ac00}'..='\u{d7a3}'
            | '\u{f900}'..='\u{faff}'
            | '\u{fe30}'..='\u{fe6f}'
            | '\u{ff00}'..='\u{ff60}'
            | '\u{ffe0}'..='\u{ffe6}'
            | '\u{1f300}'..='\u{1faff}'
            | '\u{20000}'..='\u{3fffd}'
    );
    1 + usize::from(wide)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 4] = [
        Column { right: false, spare: 0 },
        Column { right: true, spare: 1 },
        Column { right: false, spare: 2 },
        Column { right: false, spare: 0 },
    ];

    fn table(width: Option<usize>) -> Vec<String> {
        let row = |cells: [&str; 4]| cells.map(str::to_owned).to_vec();
        let rows = [
            row(["a", "1,204", "lora", "on one base"]),
            row(["tutor", "7", "", "on 日本 and a long name of it, and more"]),
        ];
        lines(&COLUMNS, &rows, width)
    }

    #[test]
    fn a_table_that_is_piped_has_all_of_its_columns() {
        let expected =
            ["a       1,204   lora   on one base", "tutor       7          on 日本 and a long name of it, and more"];
        assert_eq!(table(None), expected);
        assert_eq!(table(Some(200)), expected);
    }

    #[test]
    fn a_narrow_terminal_has_fewer_columns_and_cut_lines_and_still_a_line_a_row() {
        assert_eq!(
            table(Some(50)),
            ["a       1,204   on one base", "tutor       7   on 日本 and a long name of it, an…"]
        );
        assert_eq!(table(Some(40)), ["a       on one base", "tutor   on 日本 and a long name of it, …"]);
        for width in 1..60 {
            let lines = table(Some(width));
            assert!(lines.len() == 2 && lines.iter().all(|line| columns_of(line) <= width), "{width}: {lines:?}");
        }
    }

    #[test]
    fn a_column_of_nothing_takes_no_room() {
        let rows = vec![vec!["a".to_owned(), String::new(), String::new(), "b".to_owned()]];
        assert_eq!(lines(&COLUMNS, &rows, None), ["a   b"]);
    }
}

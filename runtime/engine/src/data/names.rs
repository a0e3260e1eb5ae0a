//! Names under which people write questions and answers: keys of public sets, and headers of tables in the languages of schools.

use super::columns::Role;

/// How sure a name is. Of two columns that may be the question the surer one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Sure {
    /// It may be something else as often: `user` is who asked, too.
    Perhaps,
    /// It is what it says.
    Yes,
    /// It is the name that this program gives it.
    Own,
}

/// Names as [`plain`] writes them.
const NAMES: [(Role, Sure, &[&str]); 16] = [
    (Role::Prompt, Sure::Own, &["prompt"]),
    (
        Role::Prompt,
        Sure::Yes,
        &[
            "question",
            "questions",
            "instruction",
            "instructions",
            "prompts",
            "question text", // English, French
            "frage",
            "fragen",
            "anweisung",
            "aufgabe",
            "fragestellung",
            "prüfungsfrage", // German
            "pregunta",
            "preguntas",
            "instrucción",
            "instruccion",
            "consigna", // Spanish
            "consigne",
            "question posée", // French
            "domanda",
            "domande",
            "istruzione",
            "quesito", // Italian
            "pergunta",
            "perguntas",
            "instrução",
            "questão", // Portuguese
            "vraag",
            "vragen",
            "opdracht", // Dutch
            "pytanie",
            "pytania",
            "polecenie", // Polish
            "fråga",
            "frågor",
            "spørgsmål",
            "spørsmål",
            "kysymys", // Swedish, Danish, Norwegian, Finnish
            "otázka",
            "otazka",
            "otázky",
            "kérdés",
            "întrebare",
            "intrebare",
            "pitanje",
            "vprašanje", // cs sk hu ro hr sl
            "küsimus",
            "jautājums",
            "klausimas",
            "galdera", // et lv lt eu
            "soru",
            "sorular",
            "câu hỏi",
            "pertanyaan",
            "soalan",
            "swali", // tr vi id ms sw
            "вопрос",
            "вопросы",
            "питання",
            "запитання",
            "въпрос",
            "ερώτηση",
            "שאלה",
            "سؤال",
            "السؤال",
            "प्रश्न",
            "সওয়াল",
            "প্রশ্ন",
            "คำถาม",
            "问题",
            "問題",
            "提问",
            "指令",
            "質問",
            "질문",
        ],
    ),
    (
        Role::Prompt,
        Sure::Perhaps,
        &[
            "query",
            "input",
            "user",
            "human",
            "q",
            "user message",
            "user prompt",
            "eingabe",
            "nutzer",
            "benutzer",
            "schüler",
            "entrada",
            "usuario",
            "utilisateur",
            "entrée",
            "utente",
            "usuário",
            "gebruiker",
            "入力",
            "输入",
            "用户",
        ],
    ),
    (Role::Completion, Sure::Own, &["completion"]),
    (
        Role::Completion,
        Sure::Yes,
        &[
            "answer",
            "answers",
            "response",
            "responses",
            "output",
            "completions",
            "answer text",
            "model answer",
            "correct answer",
            "antwort",
            "antworten",
            "ausgabe",
            "musterantwort",
            "musterlösung",
            "lösung", // German
            "respuesta",
            "respuestas",
            "salida", // Spanish
            "réponse",
            "reponse",
            "réponses",
            "sortie", // French
            "risposta",
            "risposte",
            "uscita", // Italian
            "resposta",
            "respostas",
            "saída", // Portuguese
            "antwoord",
            "antwoorden", // Dutch
            "odpowiedź",
            "odpowiedz",
            "odpowiedzi", // Polish
            "svar",
            "vastaus", // Scandinavian, Finnish
            "odpověď",
            "odpoved",
            "odpoveď",
            "válasz",
            "răspuns",
            "raspuns",
            "odgovor", // cs sk hu ro hr sl
            "vastus",
            "atbilde",
            "atsakymas",
            "erantzuna", // et lv lt eu
            "cevap",
            "yanıt",
            "cevaplar",
            "câu trả lời",
            "trả lời",
            "jawaban",
            "jawapan",
            "jibu", // tr vi id ms sw
            "ответ",
            "ответы",
            "відповідь",
            "отговор",
            "απάντηση",
            "תשובה",
            "جواب",
            "الجواب",
            "إجابة",
            "الإجابة",
            "उत्तर",
            "উত্তর",
            "คำตอบ",
            "答案",
            "回答",
            "答え",
            "解答",
            "回复",
            "답변",
            "대답",
            "정답",
        ],
    ),
    (
        Role::Completion,
        Sure::Perhaps,
        &[
            "assistant",
            "bot",
            "reply",
            "gpt",
            "a",
            "target",
            "assistant message",
            "assistant response",
            "model response",
            "chatgpt",
            "lehrer",
            "tutor",
            "出力",
            "输出",
            "助手",
        ],
    ),
    (
        Role::Input,
        Sure::Yes,
        &[
            "context",
            "kontext",
            "contexto",
            "contexte",
            "contesto",
            "passage",
            "kontekst",
            "контекст",
            "上下文",
            "文脈",
        ],
    ),
    (Role::System, Sure::Own, &["system"]),
    (Role::System, Sure::Yes, &["system prompt", "systemprompt", "system message", "persona", "systemanweisung"]),
    (Role::Text, Sure::Own, &["text"]),
    (Role::Text, Sure::Yes, &["texto", "texte", "testo", "tekst", "текст"]),
    (Role::Messages, Sure::Own, &["messages"]),
    (Role::Messages, Sure::Yes, &["conversations", "conversation"]),
    (Role::Chosen, Sure::Own, &["chosen"]),
    (Role::Rejected, Sure::Own, &["rejected"]),
    (Role::Label, Sure::Own, &["label"]),
];

/// A name without what does not count: case, white space around it, a mark behind it, and how its words are joined.
pub(super) fn plain(name: &str) -> String {
    let name = name.trim_matches(|c: char| c.is_whitespace() || matches!(c, '\u{feff}' | '"' | '\''));
    let name = name.trim_end_matches([':', '?', '*', '.', ' ']).trim_start_matches(['*', '#', ' ']);
    let mut out = String::new();
    for part in
        name.split(|c: char| c.is_whitespace() || matches!(c, '_' | '-' | '\u{a0}')).filter(|part| !part.is_empty())
    {
        out.push_str(if out.is_empty() { "" } else { " " });
        out.push_str(&part.to_lowercase());
    }
    out
}

/// What a name says, if it is known.
pub(super) fn role_of(name: &str) -> Option<(Role, Sure)> {
    let name = plain(name);
    let known = NAMES.iter().find(|(_, _, names)| names.contains(&&*name));
    match known {
        Some((role, sure, _)) => Some((*role, *sure)),
        // `tools` is no name of a column that anybody else gives.
        None => (name == "tools").then_some((Role::Tools, Sure::Own)),
    }
}

/// All names of a role that are sure.
pub(super) fn sure_names(role: Role) -> impl Iterator<Item = &'static str> {
    let of_role = NAMES.iter().filter(move |(of, sure, _)| *of == role && *sure >= Sure::Yes);
    of_role.flat_map(|(_, _, names)| names.iter().copied())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_name_is_known_however_it_is_typed() {
        for name in ["Frage", " FRAGE: ", "\u{feff}frage", "**Frage**", "Frage?"] {
            assert_eq!(role_of(name), Some((Role::Prompt, Sure::Yes)), "{name:?}");
        }
        assert_eq!(role_of("System_Prompt"), Some((Role::System, Sure::Yes)));
        assert_eq!(role_of("Réponse"), Some((Role::Completion, Sure::Yes)));
        assert_eq!(role_of("ОТВЕТ"), Some((Role::Completion, Sure::Yes)));
        assert_eq!(role_of("Antwortzeit"), None);
    }

    #[test]
    fn each_name_stands_once_and_as_it_is_compared() {
        let mut seen = BTreeSet::new();
        for name in NAMES.iter().flat_map(|(_, _, names)| *names) {
            assert_eq!(plain(name), *name);
            assert!(seen.insert(name), "{name} stands twice");
        }
    }
}

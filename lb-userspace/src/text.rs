//! Text that others chose (host names, labels, files, what agents say) on its way to a terminal or a log: it moves no cursor,
//! sets no title, breaks no line, and does not read backwards.

use std::borrow::Cow;

/// What stands where a character was that is not shown.
const HIDDEN: char = '\u{fffd}';

/// Whether a character does something to a terminal instead of showing.
fn acts(character: char) -> bool {
    character.is_control()
        || matches!(character,
            // Marks and overrides of direction, and breaks of lines and paragraphs: what is read is not what stands there.
            '\u{061c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            // Tags: they show nowhere.
            | '\u{e0000}'..='\u{e007f}')
}

/// The text as one line that only shows; each character that would act is replaced by a sign for it.
pub fn clean(text: &str) -> Cow<'_, str> {
    if text.contains(acts) { Cow::Owned(text.replace(acts, "\u{fffd}")) } else { Cow::Borrowed(text) }
}

/// The same of several lines: line breaks and tabs stay.
pub fn clean_lines(text: &str) -> Cow<'_, str> {
    let acts = |character: char| !matches!(character, '\n' | '\t') && acts(character);
    if text.contains(acts) {
        Cow::Owned(text.chars().map(|c| if acts(c) { HIDDEN } else { c }).collect())
    } else {
        Cow::Borrowed(text)
    }
}

/// JSON in which such characters are escaped: it says the same, and a terminal only shows it.
pub fn clean_json(text: &str) -> Cow<'_, str> {
    // Outside of its strings JSON has none of them but line breaks.
    let acts = |character: char| character != '\n' && acts(character);
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let mut clean = String::with_capacity(text.len() + 64);
    for character in text.chars() {
        if acts(character) {
            let units = character
                .encode_utf16(&mut [0; 2])
                .iter()
                .map(|unit| format!("\\u{unit:04x}"))
                .collect::<String>();
            clean.push_str(&units);
        } else {
            clean.push(character);
        }
    }
    Cow::Owned(clean)
}

/// A name that somebody chose for himself: clean, and of so many bytes at most.
pub fn name(text: &str, most: usize) -> String {
    let text = clean(text);
    text[..text.floor_char_boundary(most)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_a_terminal_but_what_shows() {
        assert!(matches!(clean("node1.example – überall 節点"), Cow::Borrowed(_)));
        // Clears the screen, sets the title, rings; the same by the eight-bit controls.
        assert_eq!(clean("node9\u{1b}[2J\u{1b}]0;pwned\u{7}"), "node9\u{fffd}[2J\u{fffd}]0;pwned\u{fffd}");
        assert_eq!(clean("\u{9b}2J\u{7f}\r\n\t"), "\u{fffd}2J\u{fffd}\u{fffd}\u{fffd}\u{fffd}");
        // Reads backwards, or is not seen at all.
        assert_eq!(clean("a\u{202e}b\u{200b}c\u{2066}d\u{2028}"), "a\u{fffd}b\u{fffd}c\u{fffd}d\u{fffd}");
        assert_eq!(clean_lines("a\tb\nc\u{1b}\rd"), "a\tb\nc\u{fffd}\u{fffd}d");
    }

    #[test]
    fn json_says_the_same_and_only_shows() {
        let value = serde_json::json!({"name": "a\u{9b}2J\u{7f}\u{202e}\u{e0001}\n\u{1b}b", "other": ["é"]});
        let text = format!("{value:#}");
        let clean = clean_json(&text);
        assert!(clean.chars().all(|character| character == '\n' || !acts(character)), "{clean:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&clean).unwrap(), value);
        assert!(matches!(clean_json("{\n}"), Cow::Borrowed(_)));
    }

    #[test]
    fn names_are_cut_between_characters() {
        assert_eq!(name("überall", 1), "");
        assert_eq!(name("überall", 4), "übe");
        assert_eq!(name("a\u{1b}b", 64), "a\u{fffd}b");
    }
}

//! Compares texts: the word error of a transcript, and whether a reply contains what is expected.
//!
//! Before a comparison both texts are reduced to their words: letters in lower case and digits. Punctuation and white space
//! separate words; an apostrophe within a word stays. Numbers are not spelled out.

/// The word error rate of `heard` against `said`: substituted, missing and additional words, divided by the words that were
/// said. It exceeds 1 if more was heard than said. A language that writes no spaces is compared by characters.
///
/// `None` if `said` has no words.
pub(super) fn word_error(said: &str, heard: &str) -> Option<f64> {
    let (said, heard) = if has_no_spaces(said) {
        (characters(said), characters(heard))
    } else {
        (words(said), words(heard))
    };
    let errors = strsim::generic_levenshtein(&said, &heard);
    #[expect(clippy::cast_precision_loss, reason = "a transcript has few words")]
    let rate = errors as f64 / said.len() as f64;
    (!said.is_empty()).then_some(rate)
}

/// Whether one of the phrases occurs in `text`, word by word.
pub(super) fn contains_any(text: &str, phrases: &[String]) -> bool {
    let text = words(text);
    phrases.iter().any(|phrase| {
        let phrase = words(phrase);
        !phrase.is_empty() && text.windows(phrase.len()).any(|window| window == phrase)
    })
}

fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase().replace('’', "'");
    let words = lower.split(|char: char| !char.is_alphanumeric() && char != '\'');
    let words = words.map(|word| word.trim_matches('\''));
    words
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

fn characters(text: &str) -> Vec<String> {
    let letters = text.chars().filter(|char| char.is_alphanumeric());
    letters
        .flat_map(char::to_lowercase)
        .map(String::from)
        .collect()
}

/// Whether most letters of the text belong to scripts that write no spaces between words.
fn has_no_spaces(text: &str) -> bool {
    let is_such = |char: &char| {
        matches!(u32::from(*char),
            // Thai and Lao, Myanmar, Khmer, kana, Han.
            0x0E00..=0x0EFF | 0x1000..=0x109F | 0x1780..=0x17FF | 0x3040..=0x30FF | 0x3400..=0x9FFF | 0x2_0000..=0x3_FFFF)
    };
    let letters = || text.chars().filter(|char| char.is_alphanumeric());
    letters().filter(is_such).count() * 2 > letters().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_error(said: &str, heard: &str, expected: f64) {
        let error = word_error(said, heard).unwrap();
        assert!((error - expected).abs() < 1e-9, "{error}, not {expected}");
    }

    /// Examples of jiwer (README), torchmetrics (`WordErrorRate`) and NIST's sclite (`-i spu_id` sample).
    #[test]
    fn published_examples_have_their_word_error() {
        assert_error("hello world", "hello duck", 0.5);
        assert_error(
            "i like monty python what do you mean african or european swallow",
            "i like python what you mean or swallow",
            4.0 / 12.0,
        );
        assert_error(
            "this is the reference there is another one",
            "this is the prediction there is an other sample",
            0.5,
        );
        assert_error(
            "the cat sat on the mat",
            "the cat sat on mat the",
            2.0 / 6.0,
        );
    }

    #[test]
    fn case_and_punctuation_are_no_errors() {
        assert_error(
            "Hello, World! It's 5 o’clock.",
            "hello world it's 5 o'clock",
            0.0,
        );
        assert_error("'Hi' — how can I help?", "hi how can i help", 0.0);
        assert_error("Grüß Gott", "GRÜSS GOTT", 0.5);
    }

    #[test]
    fn additional_words_can_exceed_one_and_nothing_heard_is_one() {
        assert_error("yes", "yes it is so", 3.0);
        assert_error("how are you", "", 1.0);
        assert_eq!(word_error("…", "anything"), None);
    }

    #[test]
    fn language_without_spaces_is_compared_by_characters() {
        assert_error("今日はいい天気です", "今日は天気です", 2.0 / 9.0);
        assert_error("今日はいい天気です。", "今日はいい 天気です", 0.0);
    }

    #[test]
    fn phrase_must_occur_word_by_word() {
        let any = |phrases: &[&str]| -> Vec<String> {
            phrases.iter().map(|it| (*it).to_owned()).collect()
        };
        let reply = "Your order, number 12, has been shipped.";
        assert!(contains_any(reply, &any(&["order number"])));
        assert!(contains_any(reply, &any(&["delivered", "SHIPPED"])));
        assert!(!contains_any(reply, &any(&["ship"])));
        assert!(!contains_any(reply, &any(&["number order"])));
        assert!(!contains_any(reply, &any(&["…", ""])));
    }
}

//! The texts of a call: how much of a text was spoken, and what the agent understood of its caller.

/// What the agent understands of audio that it can't tell.
const UNKNOWN_SPEECH: &str = "hello there";

/// What the agent said, and the frames that it took.
pub(super) struct Spoken {
    pub(super) text: String,
    pub(super) frames: usize,
}

/// What the agent understands of a turn with this many frames of speech. A caller that spoke as long as the agent just
/// did, echoed it.
pub(super) fn understood(spoken: &[Spoken], frames: usize) -> String {
    let echoed = (0..spoken.len()).find_map(|first| {
        let parts = &spoken[first..];
        let length: usize = parts.iter().map(|part| part.frames).sum();
        let texts = || parts.iter().map(|part| &*part.text);
        // An echo lacks the soft start and end, and packets get lost.
        (length.abs_diff(frames) <= 15 + length / 10).then(|| texts().collect::<Vec<_>>().join(" "))
    });
    echoed.unwrap_or_else(|| UNKNOWN_SPEECH.to_owned())
}

/// The text with its first `errors` words replaced; words are added to a text that is too short.
pub(super) fn with_errors(text: &str, errors: usize) -> String {
    let words = text.split_whitespace().skip(errors);
    let wrong = std::iter::repeat_n("mistaken", errors);
    wrong.chain(words).collect::<Vec<_>>().join(" ")
}

/// The words that were spoken once `part` of `whole` was played.
pub(super) fn beginning(text: &str, part: usize, whole: usize) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    let spoken = words.len() * part.min(whole) / whole.max(1);
    words[..spoken].join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spoken(text: &str, frames: usize) -> Spoken {
        let text = text.to_owned();
        Spoken { text, frames }
    }

    #[test]
    fn echo_is_understood_as_what_was_echoed() {
        let greeting = [spoken("Good day.", 100), spoken("Who is it?", 50)];
        assert_eq!(understood(&greeting, 140), "Good day. Who is it?");
        assert_eq!(understood(&greeting, 48), "Who is it?");
        assert_eq!(understood(&greeting, 400), UNKNOWN_SPEECH);
        assert_eq!(understood(&[], 50), UNKNOWN_SPEECH);
    }

    #[test]
    fn as_many_words_are_wrong_as_were_planted() {
        assert_eq!(
            with_errors("Good day to you.", 2),
            "mistaken mistaken to you."
        );
        assert_eq!(with_errors("Yes.", 2), "mistaken mistaken");
        assert_eq!(with_errors("Yes.", 0), "Yes.");
    }

    #[test]
    fn interrupted_text_ends_at_the_last_word_that_was_played() {
        assert_eq!(beginning("Good day to you.", 50, 100), "Good day");
        assert_eq!(beginning("Good day to you.", 0, 100), "");
        assert_eq!(beginning("Good day to you.", 100, 100), "Good day to you.");
    }
}

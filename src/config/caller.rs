//! Validates what the caller says and what its target expects of the agent: `[targets.X.caller]` and `[targets.X.expect]`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::file::read_regular;
use super::problem::{in_file, shown};
use super::section::{Lookup, MAX_WAIT, MIN_WAIT, RawValue, Section};
use super::settings::{Caller, CallerLine, CallerMode, Expect};
use crate::clip::{self, ClipError, SpeechClip};

/// The most lines of a script. A line holds up to 6 MB of decoded audio in memory.
const MAX_LINES: usize = 20;
const MAX_TURNS: u32 = 1000;

/// `reads_audio`: whether the files of the lines are read; otherwise the lines have no sound.
pub(super) fn read(mut section: Section<'_>, reads_audio: bool) -> Caller {
    let default = Caller::default();
    let places = Places {
        mode: section.place_of("mode"),
        lines: section.place_of("lines"),
        speaks_first: section.place_of("speaks_first"),
        interrupt: section.place_of("interrupt"),
    };
    let mode = section.choice("mode", "a mode of the caller");
    let lines = section.each_table("lines", |line| read_line(line, reads_audio));
    check_lines(&mut section, mode, lines.as_ref().map(Vec::len), &places);
    let lines = lines.filter(|_| mode == CallerMode::Script);
    let lines = lines.unwrap_or_default();
    let turns = u32::try_from(lines.len()).unwrap_or(u32::MAX);
    let caller = Caller {
        mode,
        silence: section.duration("silence", default.silence, Duration::ZERO..=MAX_WAIT),
        turns: section.number("turns", turns.clamp(1, MAX_TURNS), 1..=MAX_TURNS),
        pause: section.duration("pause", default.pause, Duration::ZERO..=MAX_WAIT),
        speaks_first: section.boolean("speaks_first", default.speaks_first),
        interrupt: section.boolean("interrupt", default.interrupt),
        lines,
    };
    let name = mode.name();
    if caller.speaks_first && mode != CallerMode::Script {
        let message = format!("mode {name:?} has nothing to say before the agent speaks");
        let hint = "set mode to \"script\", or remove speaks_first";
        section.problem("speaks_first", places.speaks_first, message, hint);
    }
    if caller.interrupt && mode == CallerMode::PassThrough {
        let message = format!("mode {name:?} can't interrupt the agent on purpose");
        let hint = "set mode to \"echo\" or \"script\", or remove interrupt";
        section.problem("interrupt", places.interrupt, message, hint);
    }
    if caller.interrupt && reads_audio {
        // Encoding the question takes about 50 ms, which must not delay the media of a call.
        SpeechClip::hello();
    }
    section.finish();
    caller
}

/// The places of the mode and of the keys that must agree with it.
struct Places {
    mode: Option<String>,
    lines: Option<String>,
    speaks_first: Option<String>,
    interrupt: Option<String>,
}

/// `count`: the number of lines; `None` if it is unknown because of a mistake that is already reported.
fn check_lines(section: &mut Section<'_>, mode: CallerMode, count: Option<usize>, places: &Places) {
    // A flag or a variable may set another mode for a target with a script.
    let is_overridden = places
        .mode
        .as_deref()
        .is_some_and(|place| in_file(place).is_none());
    if mode != CallerMode::Script && places.lines.is_some() && !is_overridden {
        let message = format!("mode {:?} plays no lines", mode.name());
        let hint = "set mode to \"script\", or remove the lines";
        section.problem("lines", places.lines.clone(), message, hint);
    }
    if mode == CallerMode::Script && count == Some(0) {
        let message = "a script needs at least one line".to_owned();
        let hint = format!(
            "add [[targets.NAME.caller.lines]] with audio = \"{}\" or a file",
            clip::BUILTIN_HELLO
        );
        section.problem("mode", places.mode.clone(), message, &hint);
    }
    if let Some(count) = count.filter(|count| *count > MAX_LINES) {
        let message = format!("{count} lines are too many");
        let hint = format!("write at most {MAX_LINES}: they repeat from the first one");
        section.problem("lines", places.lines.clone(), message, &hint);
    }
}

fn read_line(mut section: Section<'_>, reads_audio: bool) -> CallerLine {
    let (name, audio) = match section.text("audio") {
        Lookup::Found(text) => {
            let audio = audio(&mut section, &text, reads_audio);
            (text.value, audio)
        }
        Lookup::Missing => {
            let hint = format!("set a WAV or Ogg Opus file, or \"{}\"", clip::BUILTIN_HELLO);
            section.missing("audio", &hint);
            (String::new(), None)
        }
        Lookup::Invalid => (String::new(), None),
    };
    let text = spoken(
        &mut section,
        "text",
        "write what the audio says, or remove the key",
    );
    let (expected_words, expected_tool) = {
        let mut expect = section.table("expect");
        let words = words(&mut expect);
        let hint = "write the name of a tool, or remove the key";
        let tool = spoken(&mut expect, "tool", hint);
        expect.finish();
        (words, tool)
    };
    section.finish();
    CallerLine {
        name,
        audio: audio.unwrap_or_else(|| Arc::new(SpeechClip::default())),
        text,
        expected_words,
        expected_tool,
    }
}

/// `None` if the clip can't be read, which is reported, or is not wanted.
fn audio(section: &mut Section<'_>, text: &RawValue, reads_audio: bool) -> Option<Arc<SpeechClip>> {
    let kinds = format!("a WAV or Ogg Opus file, or \"{}\"", clip::BUILTIN_HELLO);
    let mut problem = |message: String, hint: &str| {
        section.problem("audio", text.place.clone(), message, hint);
        None
    };
    if text.value == clip::BUILTIN_HELLO {
        return Some(SpeechClip::hello());
    }
    if text.value.starts_with("builtin:") {
        let message = format!("{} does not exist", shown(&text.value));
        return problem(message, &format!("set {kinds}"));
    }
    if text.value.trim().is_empty() {
        return problem("the path is empty".to_owned(), &format!("set {kinds}"));
    }
    if !reads_audio {
        return None;
    }
    match read_clip(&text.path()) {
        Ok(clip) => Some(Arc::new(clip)),
        Err(reason) => {
            let message = format!("can't use {}: {reason}", text.path().display());
            problem(message, AUDIO_HINT)
        }
    }
}

const AUDIO_HINT: &str = "use speech of 0.1 to 60 s as Ogg Opus, or as WAV of 8, 12, 16, 24 or 48 kHz; this converts others: \
                          ffmpeg -i FILE -ac 1 -ar 48000 line.wav";

fn read_clip(path: &Path) -> Result<SpeechClip, String> {
    let file = read_regular(path, clip::MAX_FILE_BYTES).map_err(|error| error.to_string())?;
    SpeechClip::read(&file).map_err(|error: ClipError| error.to_string())
}

/// A text with at least one letter or digit.
fn spoken(section: &mut Section<'_>, key: &'static str, hint: &str) -> Option<String> {
    let Lookup::Found(text) = section.text(key) else {
        return None;
    };
    if has_word(&text.value) {
        return Some(text.value.trim().to_owned());
    }
    let message = format!("{} has neither letters nor digits", shown(&text.value));
    section.problem(key, text.place, message, hint);
    None
}

/// Each text is a list of alternatives, separated by `|`.
fn words(section: &mut Section<'_>) -> Vec<Vec<String>> {
    let mut words = Vec::new();
    for text in section.texts("words") {
        let alternatives: Vec<String> = text
            .value
            .split('|')
            .map(|word| word.trim().to_owned())
            .collect();
        if alternatives.iter().all(|word| has_word(word)) {
            words.push(alternatives);
            continue;
        }
        let message = format!(
            "{} has an alternative without letters and digits",
            shown(&text.value)
        );
        let hint = "separate alternatives with |, such as \"refund|money back\"";
        section.problem("words", text.place, message, hint);
    }
    words
}

fn has_word(text: &str) -> bool {
    text.chars().any(char::is_alphanumeric)
}

/// What the target expects of the agent, given what the caller says.
pub(super) fn expect(mut section: Section<'_>, caller: &Caller) -> Expect {
    let default = Expect::default();
    let [reply_place, yield_place, error_place] =
        ["reply", "yield_within", "word_error_below"].map(|key| section.place_of(key));
    let passes_through = caller.mode == CallerMode::PassThrough;
    let reply = section.boolean("reply", default.reply && !passes_through);
    // Zero is out of range, so it can stand for a missing or wrong value: these keys have no default.
    let yield_within = section.duration("yield_within", Duration::ZERO, MIN_WAIT..=MAX_WAIT);
    let word_error_below = section.number("word_error_below", 0.0, 0.01..=1.0);
    let expect = Expect {
        reply,
        yield_within: (!yield_within.is_zero()).then_some(yield_within),
        word_error_below: (word_error_below > 0.0).then_some(word_error_below),
        agent_may_leave: section.choice("agent_may_leave", "a point in the conversation"),
    };
    if reply && passes_through {
        let message = "mode \"pass_through\" of the caller can't expect a reply".to_owned();
        let hint = "remove it, or set the caller's mode to \"echo\": an agent's session hears nothing in the first 3 s of \
                    its speech, so a healthy agent may have nothing to reply to";
        section.problem("reply", reply_place.clone(), message, hint);
    }
    let needs_reply =
        |line: &CallerLine| !line.expected_words.is_empty() || line.expected_tool.is_some();
    if !reply && caller.lines.iter().any(needs_reply) {
        let message = "false, but lines of the caller expect words or a tool".to_owned();
        let hint = "remove it, or remove expect from the lines";
        section.problem("reply", reply_place, message, hint);
    }
    if yield_place.is_some() && !caller.interrupt {
        let message = "the caller does not interrupt the agent".to_owned();
        let hint = "set caller.interrupt = true, or remove yield_within";
        section.problem("yield_within", yield_place, message, hint);
    }
    if expect.word_error_below.is_some() {
        check_word_error(&mut section, error_place, caller);
    }
    section.finish();
    expect
}

/// A word error needs to know what the caller says.
fn check_word_error(section: &mut Section<'_>, place: Option<String>, caller: &Caller) {
    let (message, hint) = match caller.mode {
        CallerMode::PassThrough => (
            "the caller's mode \"pass_through\" has no turns to compare".to_owned(),
            "set the mode to \"echo\" or \"script\", or remove word_error_below",
        ),
        CallerMode::Script => {
            let Some(number) = caller.lines.iter().position(|line| line.text.is_none()) else {
                return;
            };
            (
                format!("caller.lines[{number}] has no text to compare with"),
                "write what its audio says in text, or remove word_error_below",
            )
        }
        CallerMode::Echo => return,
    };
    section.problem("word_error_below", place, message, hint);
}

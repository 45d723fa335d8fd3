//! Parses cron expressions with the meaning of crontab(5), and names the field that is wrong.
//!
//! croner parses an expression, but its errors name no field. It also accepts the name of a weekday in the month field,
//! and an empty list, which matches no time.

use std::iter::zip;

use chrono::{Datelike, NaiveDate};
use croner::Cron;
use croner::errors::CronError;
use croner::parser::{CronParser, Seconds, Year};

use super::problem::shown;

struct CronField {
    name: &'static str,
    /// The allowed values, for messages.
    values: &'static str,
    /// The allowed words, in addition to digits and signs.
    words: &'static [&'static str],
}

/// The order of an expression with six fields; one with five fields omits the second.
const FIELDS: [CronField; 6] = [
    CronField {
        name: "second",
        values: "0 to 59",
        words: &[],
    },
    CronField {
        name: "minute",
        values: "0 to 59",
        words: &[],
    },
    CronField {
        name: "hour",
        values: "0 to 23",
        words: &[],
    },
    CronField {
        name: "day of month",
        values: "1 to 31, or L for the last",
        words: &["L", "W"],
    },
    CronField {
        name: "month",
        values: "1 to 12, or jan to dec",
        words: &[
            "JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC",
        ],
    },
    CronField {
        name: "day of week",
        values: "0 to 7 (0 and 7 are Sunday), or sun to sat",
        words: &["L", "SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"],
    },
];

const FORM: &str = "write five fields: minute, hour, day of month, month, day of week; or six, with the second first";

/// What is wrong with an expression, and what to do.
pub(super) struct CronMistake {
    pub(super) message: String,
    pub(super) hint: String,
}

pub(super) fn read(expression: &str) -> Result<Cron, CronMistake> {
    let texts: Vec<&str> = expression.split_whitespace().collect();
    if let Some(mistake) = other_dialect(&texts) {
        return Err(mistake);
    }
    if let [nickname] = texts[..]
        && nickname.starts_with('@')
    {
        return parse(nickname, false).map_err(|_| CronMistake {
            message: "unknown nickname".to_owned(),
            hint: "use @hourly, @daily, @weekly, @monthly or @yearly".to_owned(),
        });
    }
    if !(5..=6).contains(&texts.len()) {
        return Err(CronMistake {
            message: format!("it has {} fields instead of 5 or 6", texts.len()),
            hint: FORM.to_owned(),
        });
    }
    let fields = &FIELDS[FIELDS.len() - texts.len()..];
    for (index, (field, text)) in zip(fields, &texts).enumerate() {
        if !(field.takes(text) && stands_alone(text, index, texts.len())) {
            return Err(CronMistake {
                message: format!("invalid {}: {}", field.name, shown(text)),
                hint: format!(
                    "{}: {}; also a list (1,5), a range (1-5), a step (*/5) or *",
                    field.name, field.values
                ),
            });
        }
    }
    // crontab(5): if neither day field contains a *, a day must match one of the two; otherwise it must match both. croner
    // by itself only looks for fields that are exactly *.
    let both = [texts.len() - 3, texts.len() - 1].map(|day| texts[day].contains('*'));
    let cron = parse(expression, both.contains(&true)).map_err(|error| CronMistake {
        message: error.to_string(),
        hint: FORM.to_owned(),
    })?;
    if matches_a_day(&cron) {
        Ok(cron)
    } else {
        Err(CronMistake {
            message: "it matches no day of any year".to_owned(),
            hint: "check the day of month and the month together".to_owned(),
        })
    }
}

/// What other programs write into the expression, and the canary has a setting for.
fn other_dialect(texts: &[&str]) -> Option<CronMistake> {
    let first = *texts.first()?;
    if let Some((name @ ("CRON_TZ" | "TZ"), zone)) = first.split_once('=') {
        return Some(CronMistake {
            message: format!("it begins with {name}="),
            hint: format!("remove it, and set time_zone = {zone:?} in addition to cron"),
        });
    }
    if first.eq_ignore_ascii_case("@every") {
        let interval = texts.get(1).copied().unwrap_or("15m");
        return Some(CronMistake {
            message: "@every is an interval".to_owned(),
            hint: format!("remove cron, and set every = {interval:?}"),
        });
    }
    None
}

impl CronField {
    fn takes(&self, text: &str) -> bool {
        let text = text.to_uppercase();
        let mut words = text
            .split(|character: char| !character.is_alphabetic())
            .filter(|word| !word.is_empty());
        let known = |word: &str| self.words.contains(&word);
        // FRIL means the last Friday of the month.
        let last = |word: &str| known("L") && word.strip_suffix('L').is_some_and(known);
        words.all(|word| known(word) || last(word))
            && !text.split(',').any(str::is_empty)
            // An extension of croner: a + makes a day match both day fields.
            && !text.contains('+')
    }
}

/// Whether croner accepts the field in an expression whose other fields are `*`.
fn stands_alone(text: &str, index: usize, fields: usize) -> bool {
    let mut expression = vec!["*"; fields];
    expression[index] = text;
    parse(&expression.join(" "), false).is_ok()
}

fn parse(expression: &str, both_days: bool) -> Result<Cron, CronError> {
    CronParser::builder()
        .seconds(Seconds::Optional)
        .year(Year::Disallowed)
        .dom_and_dow(both_days)
        .build()
        .parse(expression)
}

fn matches_a_day(cron: &Cron) -> bool {
    // Within 40 years every date, also the 29th of February, falls on every weekday.
    const DAYS: usize = 40 * 366;
    let matches = |day: NaiveDate| {
        let pattern = &cron.pattern;
        pattern.month_match(day.month()).is_ok_and(|month| month)
            && pattern
                .day_match(day.year(), day.month(), day.day())
                .is_ok_and(|day| day)
    };
    NaiveDate::from_yo_opt(2000, 1)
        .expect("the year 2000 had a first day")
        .iter_days()
        .take(DAYS)
        .any(matches)
}

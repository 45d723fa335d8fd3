//! Cron expressions with crontab's meaning, and what is wrong with one, by the name of its field.
//!
//! croner reads them, but its errors name no field; and it would take the name of a weekday for a month's number, and an
//! empty list for times that never come.

use std::iter::zip;

use chrono::{Datelike, NaiveDate};
use croner::Cron;
use croner::errors::CronError;
use croner::parser::{CronParser, Seconds, Year};

use super::problem::shown;

struct CronField {
    name: &'static str,
    /// Its values, for people.
    values: &'static str,
    /// What may stand in it beside digits and signs.
    words: &'static [&'static str],
}

/// In the order of six; five go without the first.
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
        values: "0 to 7 with Sunday as both, or sun to sat",
        words: &["L", "SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"],
    },
];

const FORM: &str =
    "write minute, hour, day of month, month, day of week; or six fields, with the second first";

/// What is wrong, and what to do about it.
pub(super) struct CronMistake {
    pub(super) message: String,
    pub(super) hint: String,
}

pub(super) fn read(expression: &str) -> Result<Cron, CronMistake> {
    let texts: Vec<&str> = expression.split_whitespace().collect();
    if let [nickname] = texts[..]
        && nickname.starts_with('@')
    {
        return parse(nickname, false).map_err(|_| CronMistake {
            message: "there is no such nickname".to_owned(),
            hint: "there are @hourly, @daily, @weekly, @monthly and @yearly".to_owned(),
        });
    }
    if !(5..=6).contains(&texts.len()) {
        return Err(CronMistake {
            message: format!("it has {} of 5 or 6 fields", texts.len()),
            hint: FORM.to_owned(),
        });
    }
    let fields = &FIELDS[FIELDS.len() - texts.len()..];
    for (index, (field, text)) in zip(fields, &texts).enumerate() {
        if !(field.takes(text) && stands_alone(text, index, texts.len())) {
            return Err(CronMistake {
                message: format!("its {} is {}", field.name, shown(text)),
                hint: format!(
                    "{}: {}; a list (1,5), a range (1-5) or a step (*/5) of them, or *",
                    field.name, field.values
                ),
            });
        }
    }
    // crontab takes a day that matches either field where neither has a *, and one that matches both otherwise; croner
    // by itself looks for fields that are a * and nothing else.
    let both = [texts.len() - 3, texts.len() - 1].map(|day| texts[day].contains('*'));
    let cron = parse(expression, both.contains(&true)).map_err(|error| CronMistake {
        message: error.to_string(),
        hint: FORM.to_owned(),
    })?;
    if ever_comes(&cron) {
        Ok(cron)
    } else {
        Err(CronMistake {
            message: "no such day ever comes".to_owned(),
            hint: "look at day of month and month together".to_owned(),
        })
    }
}

impl CronField {
    fn takes(&self, text: &str) -> bool {
        let text = text.to_uppercase();
        let mut words = text
            .split(|character: char| !character.is_alphabetic())
            .filter(|word| !word.is_empty());
        let known = |word: &str| self.words.contains(&word);
        // FRIL is the last Friday.
        let last = |word: &str| known("L") && word.strip_suffix('L').is_some_and(known);
        words.all(|word| known(word) || last(word))
            && !text.split(',').any(str::is_empty)
            // croner's sign for days that match both fields.
            && !text.contains('+')
    }
}

/// Whether the field is right in an expression that says nothing else.
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

fn ever_comes(cron: &Cron) -> bool {
    // Every combination of date and weekday, the 29th of February included, comes in 40 years.
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

//! The two pieces of Python's standard library that chat templates call: `json.dumps` and `strftime`.
//!
//! Owns their exact text form; knows nothing of templates.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

/// Keyword arguments of `json.dumps`.
#[derive(Debug, Default)]
pub(crate) struct JsonOptions {
    /// Write characters outside ASCII as `\uXXXX`.
    pub(crate) ensure_ascii: bool,
    /// Spaces per level; `None` writes one line.
    pub(crate) indent: Option<usize>,
    /// Item and key separators; Python's defaults where absent.
    pub(crate) separators: Option<Vec<String>>,
    /// Write objects in the order of their keys.
    pub(crate) sort_keys: bool,
    /// A character that is never escaped.
    pub(crate) kept: char,
}

/// `json.dumps(value, …)`.
pub(crate) fn json_dumps(value: &Value, options: &JsonOptions) -> String {
    let (item, key) = match options.separators.as_deref() {
        Some([item, key]) => (item.as_str(), key.as_str()),
        _ if options.indent.is_some() => (",", ": "),
        _ => (", ", ": "),
    };
    let mut writer = JsonWriter { out: String::new(), options, item, key };
    writer.value(value, 0);
    writer.out
}

struct JsonWriter<'a> {
    out: String,
    options: &'a JsonOptions,
    item: &'a str,
    key: &'a str,
}

impl JsonWriter<'_> {
    fn value(&mut self, value: &Value, depth: usize) {
        match value {
            Value::Null => self.out.push_str("null"),
            Value::Bool(value) => self.out.push_str(if *value { "true" } else { "false" }),
            Value::Number(number) => self.out.push_str(&number.to_string()),
            Value::String(text) => self.string(text),
            Value::Array(items) if items.is_empty() => self.out.push_str("[]"),
            Value::Array(items) => {
                self.out.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.separate(i, depth + 1);
                    self.value(item, depth + 1);
                }
                self.new_line(depth);
                self.out.push(']');
            }
            Value::Object(entries) if entries.is_empty() => self.out.push_str("{}"),
            Value::Object(entries) => {
                let mut entries: Vec<_> = entries.iter().collect();
                if self.options.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.out.push('{');
                for (i, (key, value)) in entries.into_iter().enumerate() {
                    self.separate(i, depth + 1);
                    self.string(key);
                    self.out.push_str(self.key);
                    self.value(value, depth + 1);
                }
                self.new_line(depth);
                self.out.push('}');
            }
        }
    }

    fn separate(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push_str(self.item);
        }
        self.new_line(depth);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = self.options.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (c != self.options.kept && self.options.ensure_ascii && !(' '..='~').contains(&c)) => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// `datetime.strftime(format)` for `at` in UTC, in the C locale. A directive it does not know stays as it stands.
pub(crate) fn strftime(format: &str, at: SystemTime) -> String {
    let seconds = match at.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        Err(_) => 0,
    };
    let days = seconds / 86_400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (year, month, day) = civil_from_days(days);
    let month_name = MONTHS[month as usize - 1];
    // 1 January 1970 was a Thursday.
    let day_name = DAYS[(days + 3).rem_euclid(7) as usize];
    let january_first = days_from_civil(year, 1, 1);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        let (unpadded, directive) = match directive {
            Some('-') => (true, chars.next()),
            other => (false, other),
        };
        let mut number = |value: i64, width: usize| match unpadded {
            true => out.push_str(&value.to_string()),
            false => out.push_str(&format!("{value:0width$}")),
        };
        match directive {
            Some('Y') => number(year, 4),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('H') => number(hour, 2),
            Some('I') => number((hour + 11) % 12 + 1, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('j') => number(days - january_first + 1, 3),
            Some('B') => out.push_str(month_name),
            Some('b' | 'h') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('F') => out.push_str(&format!("{year:04}-{month:02}-{day:02}")),
            Some('T') => out.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            Some('%') => out.push('%'),
            Some(other) => {
                out.push('%');
                out.push(other);
            }
            None => out.push('%'),
        }
    }
    out
}

/// (year, month 1..=12, day 1..=31) of a day counted from 1 January 1970, in the Gregorian calendar.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    // Years that begin in March put the leap day last; 719 468 days lie between 1 March 0000 and 1 January 1970.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

/// The inverse of [`civil_from_days`].
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let march_month = (month + 9) % 12;
    let day_of_year = (153 * march_month + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_as_python_prints_them() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        // python3 -c "from datetime import *; print(datetime.fromtimestamp(T, timezone.utc).strftime(F))"
        assert_eq!(strftime("%d %b %Y", at(0)), "01 Jan 1970");
        assert_eq!(strftime("%A %B %-d, %Y %H:%M:%S %j", at(1_709_210_096)), "Thursday February 29, 2024 12:34:56 060");
        assert_eq!(strftime("%y%m%d %I %p %%", at(4_102_444_799)), "991231 11 PM %");
        assert_eq!(strftime("%F %T %a %Q %", at(951_782_400)), "2000-02-29 00:00:00 Tue %Q %");
    }

    #[test]
    fn days_and_dates_are_inverse() {
        for days in (-800_000..800_000).step_by(97) {
            let (year, month, day) = civil_from_days(days);
            assert_eq!(days_from_civil(year, month, day), days);
        }
    }
}

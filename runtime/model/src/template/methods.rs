//! Methods of Python's texts, lists and dictionaries, as templates call them.
//!
//! Owns what `minijinja-contrib` lacks; the rest is its own. What can multiply its input is charged first.

use minijinja::value::{Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::guard::Guard;

pub(super) fn install(environment: &mut Environment<'static>, guard: &Guard) {
    let guard = guard.clone();
    environment.set_unknown_method_callback(move |state, value, method, arguments| {
        call(&guard, state, value, method, arguments)
    });
}

fn call(
    guard: &Guard,
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = of_text(guard, text, method, arguments)?
    {
        return Ok(result);
    }
    match (value.kind(), method) {
        (ValueKind::Seq, "index") => {
            let (wanted,): (Value,) = from_args(arguments)?;
            let items = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
            let found = items.iter().position(|item| *item == wanted);
            found.map(Value::from).ok_or_else(|| failed("the list has no such item"))
        }
        (ValueKind::Map | ValueKind::Seq, "copy") => {
            let () = from_args(arguments)?;
            Ok(value.clone())
        }
        _ => unknown_method_callback(state, value, method, arguments),
    }
}

fn failed(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_owned())
}

/// `None` where the method is left to `minijinja-contrib`.
fn of_text(guard: &Guard, text: &str, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "replace" => {
            let (from, to, count): (&str, &str, Option<i64>) = from_args(arguments)?;
            let count = count.and_then(|count| usize::try_from(count).ok());
            Value::from(guard.replace(text, from, to, count.unwrap_or(usize::MAX))?)
        }
        "join" => {
            let (items,): (&Value,) = from_args(arguments)?;
            guard.before_join(items, &[Value::from(text)])?;
            return Ok(None);
        }
        "format" => {
            guard.before_format(text, arguments)?;
            return Ok(None);
        }
        "rsplit" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(arguments)?;
            let most =
                most.and_then(|most| usize::try_from(most).ok()).map_or(usize::MAX, |most| most.saturating_add(1));
            Value::from_iter(rsplit(text, separator, most)?)
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            if separator.is_empty() {
                return Err(failed("empty separator"));
            }
            let (at, rest) = match method {
                "partition" => (text.split_once(separator), [text, "", ""]),
                _ => (text.rsplit_once(separator), ["", "", text]),
            };
            let parts = at.map_or(rest, |(before, after)| [before, separator, after]);
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "ljust" | "rjust" | "center" | "zfill" => {
            let (width, fill): (i64, Option<&str>) = from_args(arguments)?;
            Value::from(pad(guard, text, method, usize::try_from(width).unwrap_or(0), fill)?)
        }
        "index" | "rindex" => {
            let (what,): (&str,) = from_args(arguments)?;
            let at = if method == "index" { text.find(what) } else { text.rfind(what) };
            let at = at.ok_or_else(|| failed("substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        "casefold" => {
            let () = from_args(arguments)?;
            Value::from(text.to_lowercase())
        }
        "swapcase" => {
            let () = from_args(arguments)?;
            let swap = |c: char| match c.is_uppercase() {
                true => c.to_lowercase().collect::<String>(),
                false => c.to_uppercase().collect(),
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "isdecimal" => {
            let () = from_args(arguments)?;
            Value::from(!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()))
        }
        _ => return Ok(None),
    }))
}

/// At most `most` parts, split from the right; without a separator at whitespace.
fn rsplit(text: &str, separator: Option<&str>, most: usize) -> Result<Vec<Value>, Error> {
    let mut parts: Vec<Value> = match separator {
        Some("") => return Err(failed("empty separator")),
        Some(separator) => text.rsplitn(most, separator).map(Value::from).collect(),
        None => {
            let (mut parts, mut rest) = (Vec::new(), text.trim_end());
            while !rest.is_empty() {
                let split = if parts.len() + 1 < most { rest.rsplit_once(char::is_whitespace) } else { None };
                let (before, part) = split.unwrap_or(("", rest));
                parts.push(Value::from(part));
                rest = before.trim_end();
            }
            parts
        }
    };
    parts.reverse();
    Ok(parts)
}

fn pad(guard: &Guard, text: &str, method: &str, width: usize, fill: Option<&str>) -> Result<String, Error> {
    let fill = match (method, fill) {
        ("zfill", _) => "0",
        (_, fill) => fill.unwrap_or(" "),
    };
    if fill.chars().count() != 1 {
        return Err(failed("the fill character must be exactly one character long"));
    }
    let missing = width.saturating_sub(text.chars().count());
    guard.charge_text(text.len().saturating_add(missing.saturating_mul(fill.len())))?;
    // Where the padding is odd, Python gives the left side more if the width is odd, too.
    let left = match method {
        "ljust" => 0,
        "center" => missing / 2 + (missing & width & 1),
        _ => missing,
    };
    let (sign, digits) = match text.strip_prefix(['+', '-']) {
        Some(digits) if method == "zfill" => text.split_at(text.len() - digits.len()),
        _ => ("", text),
    };
    Ok(format!("{sign}{}{digits}{}", fill.repeat(left), fill.repeat(missing - left)))
}

//! What one rendering may make and hold.
//!
//! Three limits on every value (bytes of text in it, parts, depth), one on the sum of what is made, and a clock. Lazy
//! sequences become lists when they are weighed, so that none stands for more than it weighs. Loops and namespaces hold
//! values that are not seen from outside, so that they may not become part of other values: nothing nests deeper than a
//! weighed value, and nothing holds itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use minijinja::value::{ObjectRepr, Rest, Tuple, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value, escape_formatter, filters, tests};

/// Weighs a value.
pub(super) const WEIGH: &str = "\u{1}weigh";
/// Looks at the clock.
pub(super) const TICK: &str = "\u{1}tick";
/// Multiplies two values.
pub(super) const MULTIPLY: &str = "\u{1}multiply";
/// Looks at a value and the namespace that will hold it.
pub(super) const STORE: &str = "\u{1}store";
/// A variable that is 1.
pub(super) const ONE: &str = "__one";

/// Bytes of text in one value, beside a multiple of the input.
const TEXT: usize = 4 << 20;
/// Parts of one value, beside a multiple of the input.
const PARTS: usize = 250_000;
/// Bytes made by one rendering, beside a multiple of the input.
const MADE: usize = 32 << 20;
/// Bytes made by one rendering where the process has a budget, whatever the input: the plan counts them.
pub(crate) const MOST_UNDER_A_BUDGET: usize = 8 << 20;
/// What a part of a value takes.
const PART_BYTES: usize = 32;
/// Levels of one value.
const DEPTH: usize = 48;
/// The longest text of a number.
const NUMBER: usize = 400;
/// How long one rendering may take: a thousand times what a long chat needs.
const TIME: Duration = Duration::from_secs(5);

/// The account of one rendering.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    left: Arc<AtomicUsize>,
    text: usize,
    parts: usize,
    deadline: Instant,
}

/// What was counted in a value.
#[derive(Default)]
struct Size {
    text: usize,
    parts: usize,
}

fn too_much(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.to_owned())
}

impl Guard {
    /// An account for a rendering of `input` bytes of messages, which makes no more than `most` bytes.
    pub(crate) fn new(input: usize, most: usize) -> Self {
        let left = MADE.saturating_add(input.saturating_mul(32)).min(most);
        Self {
            left: Arc::new(AtomicUsize::new(left)),
            text: TEXT.saturating_add(input.saturating_mul(4)),
            parts: PARTS.saturating_add(input),
            deadline: Instant::now() + TIME,
        }
    }

    /// The same with an hour's time.
    #[cfg(test)]
    pub(crate) fn patient(self) -> Self {
        Self { deadline: Instant::now() + Duration::from_secs(3600), ..self }
    }

    /// Takes `bytes` from the account before they are made.
    pub(super) fn charge(&self, bytes: usize) -> Result<(), Error> {
        self.tick()?;
        let left = self.left.load(Ordering::Relaxed);
        let rest = left.checked_sub(bytes).ok_or_else(|| too_much("it makes more text than any chat needs"))?;
        self.left.store(rest, Ordering::Relaxed);
        Ok(())
    }

    /// Takes a text of `bytes` from the account before it is made.
    pub(super) fn charge_text(&self, bytes: usize) -> Result<(), Error> {
        if bytes > self.text {
            return Err(too_much("it makes a longer text than any chat needs"));
        }
        self.charge(bytes)
    }

    fn tick(&self) -> Result<(), Error> {
        match Instant::now() > self.deadline {
            true => Err(too_much("it takes longer than any chat needs")),
            false => Ok(()),
        }
    }

    /// Charges a value that was made, and makes a list of a lazy sequence.
    fn weigh(&self, value: Value) -> Result<Value, Error> {
        if let Some(text) = value.as_str() {
            self.charge_text(text.len())?;
            return Ok(value);
        }
        let mut size = Size::default();
        let settled = self.settle(&value, 0, false, &mut size)?;
        self.charge(size.parts * PART_BYTES)?;
        Ok(settled.unwrap_or(value))
    }

    /// Counts a value; `Some` where a part of it was lazy and the result is not.
    fn settle(&self, value: &Value, depth: usize, argument: bool, size: &mut Size) -> Result<Option<Value>, Error> {
        size.parts += 1;
        size.text += value.as_bytes().map_or(0, <[u8]>::len);
        if size.parts > self.parts || size.text > self.text {
            return Err(too_much("it makes a larger value than any chat needs"));
        }
        if depth > DEPTH {
            return Err(too_much("it nests values deeper than any chat needs"));
        }
        let Some(object) = value.as_object() else {
            return Ok(None);
        };
        let name = object.type_name();
        let (is_loop, is_namespace) = (name.ends_with("::Loop"), name.ends_with("::Namespace"));
        if (is_loop || is_namespace) && depth > 0 && !argument {
            return Err(too_much("it keeps a loop or a namespace in another value"));
        }
        if is_loop || (is_namespace && argument) {
            return Ok(None);
        }
        let arguments = name.ends_with("::KwargsValues");
        match object.repr() {
            ObjectRepr::Map => {
                let (mut pairs, mut changed) = (Vec::new(), false);
                for (key, value) in object.try_iter_pairs().into_iter().flatten() {
                    self.settle(&key, depth + 1, false, size)?;
                    let settled = self.settle(&value, depth + 1, arguments, size)?;
                    changed |= settled.is_some();
                    pairs.push((key, settled.unwrap_or(value)));
                }
                Ok((changed && !is_namespace && !arguments).then(|| Value::from_pairs(pairs)))
            }
            ObjectRepr::Seq | ObjectRepr::Iterable => {
                let (mut items, mut changed) = (Vec::new(), object.repr() == ObjectRepr::Iterable);
                for item in value.try_iter()?.checked() {
                    let item = item?;
                    let settled = self.settle(&item, depth + 1, false, size)?;
                    changed |= settled.is_some();
                    items.push(settled.unwrap_or(item));
                }
                Ok(changed.then(|| match value.is_tuple() {
                    true => Value::from(Tuple::from(items)),
                    false => Value::from(items),
                }))
            }
            _ => Ok(None),
        }
    }

    /// Looks at (value, namespace) before the one becomes part of the other.
    fn store(&self, pair: Value) -> Result<Value, Error> {
        let (value, namespace) = (pair.get_item_by_index(0)?, pair.get_item_by_index(1)?);
        let mut size = Size::default();
        self.settle(&value, 1, false, &mut size)?;
        self.settle(&namespace, 0, false, &mut size)?;
        self.tick()?;
        Ok(pair)
    }

    fn multiply(&self, left: &Value, right: &Value) -> Result<Value, Error> {
        let repeated = |value: &Value| value.as_str().is_some() || is_list(value);
        let (value, count) = match (repeated(left), repeated(right)) {
            (true, false) => (left, right),
            (false, true) => (right, left),
            _ => return product(left, right),
        };
        // In Python, a text or a list times a negative number is empty.
        let count = match i64::try_from(count.clone()) {
            Ok(count) if count.is_negative() => 0,
            Ok(count) => usize::try_from(count).unwrap_or(usize::MAX),
            Err(_) => return Err(too_much("texts and lists can only be multiplied with integers")),
        };
        if let Some(text) = value.as_str() {
            self.charge_text(text.len().saturating_mul(count))?;
            return Ok(Value::from(text.repeat(count)));
        }
        let mut size = Size::default();
        self.settle(value, 0, false, &mut size)?;
        let (parts, text) = (size.parts.saturating_mul(count), size.text.saturating_mul(count));
        if parts > self.parts || text > self.text {
            return Err(too_much("it makes a larger value than any chat needs"));
        }
        self.charge(parts * PART_BYTES)?;
        let items = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
        let repeated: Vec<Value> = (0..count).flat_map(|_| items.iter().cloned()).collect();
        Ok(match value.is_tuple() {
            true => Value::from(Tuple::from(repeated)),
            false => Value::from(repeated),
        })
    }

    /// Bytes of text and parts in all of `values`.
    fn size_of(&self, values: &[Value]) -> Result<Size, Error> {
        let mut size = Size::default();
        for value in values {
            self.settle(value, 0, false, &mut size)?;
        }
        Ok(size)
    }

    /// Charges what joining `items` with `joiner` makes.
    pub(super) fn before_join(&self, items: &Value, rest: &[Value]) -> Result<(), Error> {
        let size = self.size_of(std::slice::from_ref(items))?;
        let parts = size.parts.max(items.as_str().map_or(0, str::len));
        self.charge_text(parts.saturating_mul(self.size_of(rest)?.text).saturating_add(size.text))
    }

    /// Charges what formatting makes: each directive gives its argument, padded to a width.
    pub(super) fn before_format(&self, format: &str, arguments: &[Value]) -> Result<(), Error> {
        let directives = format.bytes().filter(|byte| matches!(byte, b'%' | b'{')).count();
        let digits = format.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
        let widths = digits.map(|digits| digits.parse().unwrap_or(usize::MAX)).fold(0, usize::saturating_add);
        // A width may be an argument, too.
        let given = if format.contains('*') || has_nested_braces(format) { largest_number(arguments) } else { 0 };
        let each = self.size_of(arguments)?.text.saturating_add(NUMBER).saturating_add(given);
        let padded = directives.saturating_mul(each).saturating_add(widths);
        self.charge_text(padded.saturating_add(format.len()))
    }

    /// What replacing gives.
    pub(super) fn replace(&self, text: &str, from: &str, to: &str, count: usize) -> Result<String, Error> {
        let found = text.matches(from).take(count).count();
        self.charge_text(text.len().saturating_add(found.saturating_mul(to.len())))?;
        Ok(text.replacen(from, to, count))
    }
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

fn has_nested_braces(format: &str) -> bool {
    let depths = format.bytes().scan(0usize, |depth, byte| {
        match byte {
            b'{' => *depth += 1,
            b'}' => *depth = depth.saturating_sub(1),
            _ => {}
        }
        Some(*depth)
    });
    depths.max() > Some(1)
}

fn product(left: &Value, right: &Value) -> Result<Value, Error> {
    let countable = |value: &Value| value.is_number() || value.kind() == ValueKind::Bool;
    if !countable(left) || !countable(right) {
        let message = format!("tried to use * operator on unsupported types {} and {}", left.kind(), right.kind());
        return Err(too_much(&message));
    }
    let is_float = |value: &Value| value.is_number() && !value.is_integer();
    if is_float(left) || is_float(right) {
        let float = |value: &Value| match value.kind() {
            ValueKind::Bool => Ok(f64::from(u8::from(value.is_true()))),
            _ => f64::try_from(value.clone()),
        };
        return Ok(Value::from(float(left)? * float(right)?));
    }
    let product = i128::try_from(left.clone())?.checked_mul(i128::try_from(right.clone())?);
    let product = product.ok_or_else(|| too_much("a product is too large"))?;
    Ok(i64::try_from(product).map_or_else(|_| Value::from(product), Value::from))
}

/// The largest number among `values` and their parts.
fn largest_number(values: &[Value]) -> usize {
    let number = |value: &Value| usize::try_from(value.clone()).unwrap_or(0);
    let inner =
        values.iter().filter_map(Value::as_object).flat_map(|object| object.try_iter_pairs().into_iter().flatten());
    values.iter().map(number).chain(inner.map(|(_, value)| number(&value))).max().unwrap_or(0)
}

type Before = fn(&Guard, &[Value]) -> Result<(), Error>;

/// A filter of `minijinja` that is charged before it begins.
fn charged(
    guard: &Guard,
    filter: Value,
    before: Before,
) -> impl Fn(&mut State<'_, '_>, Rest<ValueOrKwargs>) -> Result<Value, Error> + Send + Sync + 'static {
    let guard = guard.clone();
    move |state, arguments| {
        let arguments = arguments.into_values();
        before(&guard, &arguments)?;
        filter.call(state, &arguments)
    }
}

/// Gives an environment the filters, tests and formatter that keep to an account.
pub(super) fn install(environment: &mut Environment<'static>, guard: &Guard) {
    let own = guard.clone();
    environment.add_filter(WEIGH, move |value: ValueOrKwargs| own.weigh((*value).clone()));
    let own = guard.clone();
    environment.add_filter(TICK, move |value: ValueOrKwargs| own.tick().map(|()| (*value).clone()));
    let own = guard.clone();
    environment.add_filter(MULTIPLY, move |left: Value, right: Value| own.multiply(&left, &right));
    let own = guard.clone();
    environment.add_filter(STORE, move |pair: Value| own.store(pair));
    environment.add_global(ONE, 1);

    let own = guard.clone();
    environment.set_formatter(move |out, state, value| {
        match value.as_str() {
            Some(text) => own.charge(text.len())?,
            None => own.charge(own.size_of(std::slice::from_ref(value))?.text)?,
        }
        escape_formatter(out, state, value)
    });

    let own = guard.clone();
    environment.add_filter("replace", move |text: Value, from: Value, to: Value, count: Option<usize>| {
        let text_of = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        own.replace(&text_of(&text), &text_of(&from), &text_of(&to), count.unwrap_or(usize::MAX))
    });
    environment.add_filter(
        "join",
        charged(guard, Value::from_function(filters::join), |guard, arguments| {
            let (items, rest) = arguments.split_first().ok_or_else(|| too_much("join needs a list"))?;
            guard.before_join(items, rest)
        }),
    );
    environment.add_filter(
        "format",
        charged(guard, Value::from_function(filters::format), |guard, arguments| {
            let (format, rest) = arguments.split_first().ok_or_else(|| too_much("format needs a text"))?;
            guard.before_format(format.as_str().unwrap_or_default(), rest)
        }),
    );
    environment.add_filter(
        "indent",
        charged(guard, Value::from_function(filters::indent), |guard, arguments| {
            let lines = arguments.first().and_then(Value::as_str).map_or(1, |text| text.split('\n').count());
            guard.charge_text(lines.saturating_mul(largest_number(arguments)))
        }),
    );
    let fills: Before = |guard, arguments| guard.charge(largest_number(arguments).saturating_mul(PART_BYTES));
    environment.add_filter("batch", charged(guard, Value::from_function(filters::batch), fills));
    environment.add_filter("slice", charged(guard, Value::from_function(filters::slice), fills));
    environment.add_filter(
        "sum",
        charged(guard, Value::from_function(filters::sum), |guard, arguments| {
            // Adding texts or lists copies what was added before.
            let size = guard.size_of(arguments)?;
            guard.charge(size.parts.saturating_mul(size.text).saturating_add(size.parts))
        }),
    );
    // Jinja has neither, and each may take a long list for every item of another.
    environment.remove_filter("chain");
    environment.remove_filter("zip");
    // Whoever renders has its own, with the form that Python gives JSON.
    environment.remove_filter("tojson");
    let own = guard.clone();
    environment.add_test("in", move |state: &State<'_, '_>, value: &Value, list: &Value| {
        own.tick()?;
        tests::is_in(state, value, list)
    });
}

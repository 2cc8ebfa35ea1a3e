//! What pictures are made of: a frame with axes, and shapes in it.

use std::fmt::Write as _;

use super::BEGIN;

/// Width of every picture.
pub(super) const WIDTH: f64 = 720.0;
/// Room for labels at the left, the top, the right and the bottom.
const MARGIN: [f64; 4] = [56.0, 40.0, 16.0, 48.0];

const STYLE: &str = "<style>\
.st-picture{font:13px system-ui,sans-serif;--ink:#1f2328;--faint:#59636e;--line:#d1d9e0;--paper:#ffffff;\
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#56b4e9;--c5:#b58900}\
@media(prefers-color-scheme:dark){.st-picture{--ink:#f0f6fc;--faint:#9da7b1;--line:#3d444d;--paper:#0d1117;\
--c0:#56b4e9;--c1:#e69f00;--c2:#2fcf9f;--c3:#e29cc4;--c4:#9bd1f5;--c5:#f0e442}}\
.st-picture text{fill:var(--ink)}.st-picture .faint{fill:var(--faint)}.st-picture .axis{stroke:var(--faint)}\
.st-picture .grid{stroke:var(--line)}.st-picture .paper{fill:var(--paper)}</style>";

/// Text as it may stand in markup.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// The colour of the series of this number.
pub(super) fn color(series: usize) -> String {
    format!("var(--c{})", series % 6)
}

/// A number with as many digits as it needs.
pub(super) fn number(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => 0,
        large if large >= 100.0 => 0,
        some if some >= 10.0 => 1,
        some if some >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A picture being made.
pub(super) struct Svg {
    out: String,
    height: f64,
}

/// What an axis measures, and its ends.
#[derive(Clone, Copy)]
pub(super) struct Axis<'a> {
    pub(super) label: &'a str,
    pub(super) from: f64,
    pub(super) to: f64,
}

impl Svg {
    /// A picture with a title, and a description for those who do not see it; below its axes there is room of `foot`.
    pub(super) fn new(title: &str, description: &str, height: f64, foot: f64) -> Self {
        let (title, description, all) = (escape(title), escape(description), height + foot);
        let mut out = format!(
            "{BEGIN} xmlns=\"http://www.w3.org/2000/svg\" class=\"st-picture\" role=\"img\" viewBox=\"0 0 {WIDTH} {all}\" \
             aria-label=\"{title}. {description}\"><title>{title}</title><desc>{description}</desc>{STYLE}\
             <rect class=\"paper\" width=\"{WIDTH}\" height=\"{all}\"/>"
        );
        let _ = write!(out, "<text x=\"{}\" y=\"20\" font-weight=\"600\">{title}</text>", MARGIN[0]);
        Self { out, height }
    }

    /// Left, top, width and height of what lies between the axes.
    pub(super) fn inner(&self) -> [f64; 4] {
        let [left, top, right, bottom] = MARGIN;
        [left, top, WIDTH - left - right, self.height - top - bottom]
    }

    /// Where a value lies across.
    pub(super) fn x(&self, axis: Axis<'_>, value: f64) -> f64 {
        let [left, _, width, _] = self.inner();
        left + width * (value - axis.from) / (axis.to - axis.from)
    }

    /// Where a value lies upwards.
    pub(super) fn y(&self, axis: Axis<'_>, value: f64) -> f64 {
        let [_, top, _, height] = self.inner();
        top + height * (1.0 - (value - axis.from) / (axis.to - axis.from))
    }

    /// Text; `anchor` is `start`, `middle` or `end`.
    pub(super) fn text(&mut self, x: f64, y: f64, anchor: &str, class: &str, text: &str) {
        let text = escape(text);
        let _ = write!(
            self.out,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{text}</text>"
        );
    }

    /// Markup as it is.
    pub(super) fn push(&mut self, markup: &str) {
        self.out.push_str(markup);
    }

    /// A mark at whose end `shape` stands: it tells what it is when it is pointed at.
    pub(super) fn mark(&mut self, shape: &str, value: f64, told: &str) {
        let (tag, rest) = shape.split_once(' ').unwrap_or((shape, ""));
        let told = escape(told);
        let _ = write!(self.out, "<{tag} data-value=\"{value:.6}\" {rest}><title>{told}</title></{tag}>");
    }

    /// The name of the axis across, and numbers at `ticks`.
    pub(super) fn across(&mut self, axis: Axis<'_>, ticks: &[(f64, String)]) {
        let [left, top, width, height] = self.inner();
        let bottom = top + height;
        let _ = write!(
            self.out,
            "<line class=\"axis\" x1=\"{left}\" y1=\"{bottom}\" x2=\"{}\" y2=\"{bottom}\"/>",
            left + width
        );
        for (value, name) in ticks {
            let x = self.x(axis, *value);
            self.text(x, bottom + 16.0, "middle", "faint", name);
        }
        self.text(left + width / 2.0, bottom + 36.0, "middle", "", axis.label);
    }

    /// The name of the axis upwards, and numbers at `ticks`, with lines where `grid` says so.
    pub(super) fn upwards(&mut self, axis: Axis<'_>, ticks: &[(f64, String)], grid: bool) {
        let [left, top, width, height] = self.inner();
        for (value, name) in ticks {
            let y = self.y(axis, *value);
            if grid {
                let right = left + width;
                let _ =
                    write!(self.out, "<line class=\"grid\" x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>");
            }
            self.text(left - 6.0, y + 4.0, "end", "faint", name);
        }
        let (x, y) = (14.0, top + height / 2.0);
        let label = escape(axis.label);
        let _ = write!(
            self.out,
            "<text x=\"{x}\" y=\"{y:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 {x} {y:.1})\">{label}</text>"
        );
    }

    /// The whole picture.
    pub(super) fn finish(mut self) -> String {
        self.out.push_str("</svg>\n");
        self.out
    }
}

/// Round numbers from `from` to `to`, about `n` of them.
pub(super) fn round_ticks(from: f64, to: f64, n: usize) -> Vec<(f64, String)> {
    let rough = (to - from) / n.max(1) as f64;
    if rough.is_nan() || rough <= 0.0 {
        return vec![(from, number(from))];
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|&step| step >= rough).unwrap_or(rough);
    let first = (from / step).ceil() as i64;
    let last = (to / step + 1e-9).floor() as i64;
    (first..=last).map(|i| i as f64 * step).map(|value| (value, number(value))).collect()
}

/// Every so many whole numbers below `n`, about ten of them, each in the middle of its place.
pub(super) fn counted_ticks(n: usize) -> Vec<(f64, String)> {
    let step = [1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 200, 500].into_iter().find(|step| n <= 13 * step).unwrap_or(1000);
    (0..n).step_by(step).map(|i| (i as f64 + 0.5, i.to_string())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let values = |from, to| round_ticks(from, to, 5).into_iter().map(|(_, name)| name).collect::<Vec<_>>();
        assert_eq!(values(0.0, 1.0), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(values(0.0, 47.0), ["0", "10", "20", "30", "40"]);
        assert_eq!(values(3.0, 3.0), ["3"]);
        assert_eq!(counted_ticks(8).len(), 8);
        assert!(counted_ticks(64).len() <= 13 && counted_ticks(3000).len() <= 13);
    }

    #[test]
    fn text_is_no_markup() {
        assert_eq!(escape("<a & \"b\">\u{1}"), "&lt;a &amp; &quot;b&quot;&gt; ");
    }
}

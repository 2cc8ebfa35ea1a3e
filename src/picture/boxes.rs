//! Box plots: for each place the middle half of many values, their median, and where nine of ten lie.

use super::svg::{Axis, Svg, color, counted_ticks, number, round_ticks};

/// What a box shows.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(crate) struct Quartiles {
    /// One of twenty values is below.
    pub(crate) p5: f64,
    /// A quarter is below.
    pub(crate) p25: f64,
    /// Half are.
    pub(crate) median: f64,
    /// Three quarters are.
    pub(crate) p75: f64,
    /// All but one of twenty are.
    pub(crate) p95: f64,
    /// Their mean.
    pub(crate) mean: f64,
}

/// A box for each of `all`, on a scale from 0 to 1.
pub(crate) fn boxes(
    title: &str,
    description: &str,
    across: &str,
    upwards: &str,
    all: &[Quartiles],
    series: usize,
) -> String {
    let mut svg = Svg::new(title, description, 300.0, 0.0);
    let x_axis = Axis { label: across, from: 0.0, to: all.len().max(1) as f64 };
    let y_axis = Axis { label: upwards, from: 0.0, to: 1.0 };
    svg.upwards(y_axis, &round_ticks(0.0, 1.0, 5), true);
    svg.across(x_axis, &counted_ticks(all.len()));
    let width = (svg.inner()[2] / all.len().max(1) as f64 * 0.62).min(40.0);
    let fill = color(series);
    for (i, q) in all.iter().enumerate() {
        let x = svg.x(x_axis, i as f64 + 0.5);
        let [low, from, median, to, high] = [q.p5, q.p25, q.median, q.p75, q.p95].map(|value| svg.y(y_axis, value));
        svg.push(&format!(
            "<path class=\"axis\" fill=\"none\" d=\"M{x:.1} {low:.1}V{from:.1}M{x:.1} {to:.1}V{high:.1}M{a:.1} {low:.1}H{b:.1}M{a:.1} \
             {high:.1}H{b:.1}\"/>",
            a = x - width / 4.0,
            b = x + width / 4.0,
        ));
        let shape = format!(
            "rect class=\"box\" x=\"{:.1}\" y=\"{to:.1}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"{fill}\" fill-opacity=\"0.45\" \
             stroke=\"{fill}\"",
            x - width / 2.0,
            (from - to).max(0.5)
        );
        let told = format!(
            "{i}: median {}, half between {} and {}, nine of ten between {} and {}",
            number(q.median),
            number(q.p25),
            number(q.p75),
            number(q.p5),
            number(q.p95)
        );
        svg.mark(&shape, q.median, &told);
        svg.push(&format!(
            "<line stroke=\"var(--ink)\" stroke-width=\"2\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{median:.1}\" y2=\"{median:.1}\"/>",
            x - width / 2.0,
            x + width / 2.0
        ));
    }
    svg.finish()
}

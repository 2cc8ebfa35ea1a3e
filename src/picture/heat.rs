//! Heat maps: a cell for each pair of a row and a column.

use std::fmt::Write as _;

use super::svg::{Axis, Svg, WIDTH, counted_ticks, number};

/// What a heat map shows.
pub(crate) struct Heat<'a> {
    pub(crate) title: &'a str,
    pub(crate) description: &'a str,
    /// From the top.
    pub(crate) rows: &'a [Vec<f64>],
    pub(crate) row: &'a str,
    pub(crate) column: &'a str,
    /// What a value is.
    pub(crate) value: &'a str,
    /// The value of the brightest colour.
    pub(crate) most: f64,
    /// What a cell is called, by row and column.
    pub(crate) name: &'a dyn Fn(usize, usize) -> String,
}

/// cividis, which looks the same to people with and without red-green blindness, from dark to bright.
const COLORS: [[f64; 3]; 9] = [
    [0.0, 32.0, 77.0],
    [0.0, 54.0, 111.0],
    [57.0, 72.0, 107.0],
    [87.0, 92.0, 109.0],
    [112.0, 113.0, 115.0],
    [138.0, 134.0, 120.0],
    [166.0, 157.0, 117.0],
    [203.0, 186.0, 105.0],
    [255.0, 234.0, 70.0],
];

fn color(share: f64) -> String {
    let at = share.clamp(0.0, 1.0) * (COLORS.len() - 1) as f64;
    let low = (at as usize).min(COLORS.len() - 2);
    let mix = |i: usize| COLORS[low][i] + (COLORS[low + 1][i] - COLORS[low][i]) * (at - low as f64);
    format!("#{:02x}{:02x}{:02x}", mix(0) as u8, mix(1) as u8, mix(2) as u8)
}

/// The picture.
pub(crate) fn heat(of: &Heat<'_>) -> String {
    let n_rows = of.rows.len().max(1);
    let n_columns = of.rows.first().map_or(1, Vec::len).max(1);
    let cell = (420.0 / n_rows as f64).clamp(6.0, 22.0);
    let mut svg = Svg::new(of.title, of.description, 88.0 + cell * n_rows as f64, 0.0);
    let [left, top, width, _] = svg.inner();
    let across = Axis { label: of.column, from: 0.0, to: n_columns as f64 };
    // The first row is at the top.
    let down = Axis { label: of.row, from: n_rows as f64, to: 0.0 };
    let step = width / n_columns as f64;
    for (r, row) in of.rows.iter().enumerate() {
        for (c, &value) in row.iter().enumerate() {
            let shape = format!(
                "rect class=\"cell\" x=\"{:.2}\" y=\"{:.2}\" width=\"{:.2}\" height=\"{:.2}\" fill=\"{}\"",
                left + step * c as f64,
                top + cell * r as f64,
                step + 0.1,
                cell + 0.1,
                color(value / of.most)
            );
            svg.mark(&shape, value, &format!("{}: {} {}", (of.name)(r, c), number(value), of.value));
        }
    }
    svg.across(across, &counted_ticks(n_columns));
    svg.upwards(down, &counted_ticks(n_rows), false);
    legend(&mut svg, of);
    svg.finish()
}

/// The colours and what they mean, at the top right.
fn legend(svg: &mut Svg, of: &Heat<'_>) {
    const STEPS: usize = 24;
    let (right, step) = (WIDTH - 60.0, 5.0);
    let left = right - STEPS as f64 * step;
    let mut bar = String::new();
    for i in 0..STEPS {
        let fill = color(i as f64 / (STEPS - 1) as f64);
        let _ = write!(
            bar,
            "<rect x=\"{:.1}\" y=\"10\" width=\"{step}\" height=\"12\" fill=\"{fill}\"/>",
            left + step * i as f64
        );
    }
    svg.push(&bar);
    svg.text(left - 6.0, 20.0, "end", "faint", &format!("{}: 0", of.value));
    svg.text(right + 6.0, 20.0, "start", "faint", &number(of.most));
}

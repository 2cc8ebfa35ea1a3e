//! Lines through points, one for each series.

use super::svg::{Axis, Svg, color, escape, number, round_ticks};

/// Points of one name.
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// What the lines show.
pub(crate) struct Lines<'a> {
    pub(crate) title: &'a str,
    pub(crate) description: &'a str,
    pub(crate) across: &'a str,
    pub(crate) upwards: &'a str,
    pub(crate) series: &'a [Series],
    /// Names for places across, instead of round numbers.
    pub(crate) ticks: Option<Vec<(f64, String)>>,
}

const HEIGHT: f64 = 320.0;
const DASHES: [&str; 6] = ["none", "7 4", "2 3", "9 3 2 3", "4 2", "1 2"];

/// The picture.
pub(crate) fn lines(of: &Lines<'_>) -> String {
    let mut svg = Svg::new(of.title, of.description, HEIGHT, 18.0 * of.series.len() as f64 + 6.0);
    let points = || of.series.iter().flat_map(|series| &series.points);
    let ends = |value: fn(&(f64, f64)) -> f64| {
        points()
            .map(value)
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
    };
    let ((x_from, x_to), (_, y_to)) = (ends(|point| point.0), ends(|point| point.1));
    let wide = |from: f64, to: f64| if to > from { (from, to) } else { (from - 0.5, from + 0.5) };
    let (x_from, x_to) = if x_from.is_finite() { wide(x_from, x_to) } else { (0.0, 1.0) };
    let y_to = if y_to.is_finite() && y_to > 0.0 { y_to * 1.05 } else { 1.0 };
    let x_axis = Axis { label: of.across, from: x_from, to: x_to };
    let y_axis = Axis { label: of.upwards, from: 0.0, to: y_to };
    svg.upwards(y_axis, &round_ticks(0.0, y_to, 5), true);
    let ticks = of.ticks.clone().unwrap_or_else(|| round_ticks(x_from, x_to, 8));
    svg.across(x_axis, &ticks);
    for (i, series) in of.series.iter().enumerate() {
        let (stroke, dash) = (color(i), DASHES[i % DASHES.len()]);
        let places: Vec<(f64, f64)> =
            series.points.iter().map(|&(x, y)| (svg.x(x_axis, x), svg.y(y_axis, y))).collect();
        let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let path = path.join(" ");
        svg.push(&format!(
            "<polyline fill=\"none\" stroke=\"{stroke}\" stroke-width=\"2\" stroke-dasharray=\"{dash}\" points=\"{path}\"/>"
        ));
        for (&(x, y), &(px, py)) in series.points.iter().zip(&places) {
            let told = format!("{}: {} at {}", series.name, number(y), number(x));
            svg.mark(&mark(i, px, py, &stroke), y, &told);
        }
        // Below the axis.
        let (x, y) = (70.0, HEIGHT + 8.0 + 18.0 * i as f64);
        svg.push(&format!(
            "<g><line stroke=\"{stroke}\" stroke-width=\"2\" stroke-dasharray=\"{dash}\" x1=\"{x}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\"/></g>",
            x + 40.0
        ));
        let shape = mark(i, x + 20.0, y, &stroke);
        svg.push(&format!("<{shape}/>"));
        svg.push(&format!("<text x=\"{}\" y=\"{}\">{}</text>", x + 50.0, y + 4.0, escape(&series.name)));
    }
    svg.finish()
}

/// The mark of a series: circle, square, triangle, diamond and so on.
fn mark(series: usize, x: f64, y: f64, color: &str) -> String {
    let polygon = |points: &[(f64, f64)]| {
        let points: Vec<String> = points.iter().map(|(dx, dy)| format!("{:.1},{:.1}", x + dx, y + dy)).collect();
        format!("polygon class=\"point\" fill=\"{color}\" points=\"{}\"", points.join(" "))
    };
    match series % 4 {
        0 => format!("circle class=\"point\" fill=\"{color}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\""),
        1 => polygon(&[(-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5)]),
        2 => polygon(&[(0.0, -4.5), (4.5, 3.5), (-4.5, 3.5)]),
        _ => polygon(&[(0.0, -5.0), (5.0, 0.0), (0.0, 5.0), (-5.0, 0.0)]),
    }
}

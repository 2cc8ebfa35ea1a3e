//! Pictures as SVG: heat maps, boxes and lines, with axes, units and words for those who do not see them.
//!
//! Every picture stands alone, with its own style for light and dark, and may lie in a page with others. Colours can be told apart by
//! colour-blind people, and never carry a meaning alone: series differ in marks and dashes, too. Each mark has its value as a text that
//! shows when it is pointed at, and as `data-value`.

mod boxes;
mod heat;
mod lines;
mod svg;

pub(crate) use boxes::{Quartiles, boxes};
pub(crate) use heat::{Heat, heat};
pub(crate) use lines::{Lines, Series, lines};
pub(crate) use svg::escape;

/// How every picture begins, so that one can be told from other files.
pub(crate) const BEGIN: &str = "<svg data-made-by=\"st-tool\"";

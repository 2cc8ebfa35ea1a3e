//! st-tool.
fn main() {}

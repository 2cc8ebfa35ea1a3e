//! Tables: Markdown whose columns also line up where it is read as it is.

/// A table of `rows`, the first of which is the head. The first column is flush left, the others right.
pub(crate) fn markdown(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    // At least as wide as the rule below the head.
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0).max(3)).collect();
    let mut out = String::new();
    for (n, row) in rows.iter().enumerate() {
        for (column, &width) in widths.iter().enumerate() {
            let cell = row.get(column).map_or("", String::as_str);
            out.push_str(&if column == 0 { format!("| {cell:<width$} ") } else { format!("| {cell:>width$} ") });
        }
        out.push_str("|\n");
        if n == 0 {
            for (column, &width) in widths.iter().enumerate() {
                let (dashes, end) = ("-".repeat(width), if column == 0 { "-" } else { ":" });
                out.push_str(&format!("|-{dashes}{end}"));
            }
            out.push_str("|\n");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["name", "n"], ["ä", "1000"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(markdown(&rows), "| name |    n |\n|------|-----:|\n| ä    | 1000 |\n");
    }
}

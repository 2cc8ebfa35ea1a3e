//! Sizes in bytes as people write and read them.
//!
//! `512MiB`, `1GiB`, `8.5GiB`, `1G` (= GiB) and plain numbers of bytes come in; decimal units (`1GB`) are refused rather
//! than guessed at.

/// Reads a size.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "kb" | "mb" | "gb" | "tb" => {
            return Err(format!("write {number}{}iB (1 KiB = 1024 bytes)", &unit.trim()[..1].to_ascii_uppercase()));
        }
        _ => return Err("write a size such as 512MiB, 1GiB, 8.5GiB or a number of bytes".to_owned()),
    };
    let invalid = || "write a size such as 512MiB, 1GiB, 8.5GiB or a number of bytes".to_owned();
    if shift == 0 || !number.contains('.') {
        let whole: u64 = number.parse().map_err(|_| invalid())?;
        return whole.checked_mul(1 << shift).filter(|&size| size > 0).ok_or_else(|| "the size is out of range".into());
    }
    let fraction: f64 = number.parse().map_err(|_| invalid())?;
    let size = fraction * (1u64 << shift) as f64;
    if (1.0..u64::MAX as f64).contains(&size) { Ok(size as u64) } else { Err("the size is out of range".into()) }
}

/// `1.90 GiB`: three digits and the unit that suits.
pub(crate) fn show_size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_the_documentation_says() {
        for (text, bytes) in [
            ("512MiB", 512 << 20),
            ("1GiB", 1 << 30),
            ("1G", 1 << 30),
            ("1g", 1 << 30),
            ("8.5GiB", 17 << 29),
            ("0.5 KiB", 512),
            ("123", 123),
            ("123B", 123),
            ("2TiB", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "GiB", "1.2.3G", "-1G", "1X", "1.5", "0", "0G", "99999999999T", "1e9", "NaN", "."] {
            assert!(parse_size(text).is_err(), "{text:?} was accepted");
        }
        assert_eq!(parse_size("1GB"), Err("write 1GiB (1 KiB = 1024 bytes)".into()));
    }

    #[test]
    fn sizes_are_shown_with_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1_990_656, "1.90 MiB"),
            (663_552, "648 KiB"),
            (1023 << 20, "1.00 GiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(show_size(bytes), text);
        }
    }
}

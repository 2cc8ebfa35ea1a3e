//! What is told of a failure to who asked: what and why, and no folder of this machine.

use std::error::Error;

/// The chain of causes in one line, folders left out of the paths in it.
pub(crate) fn without_folders(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = error.source();
    }
    strip(&text)
}

/// `text` with every path in it cut to the name at its end.
fn strip(text: &str) -> String {
    let words = text.split(' ').map(|word| match word.contains(['/', '\\']) {
        true => {
            let quote = word.chars().take_while(|c| "`\"'(".contains(*c)).count();
            let name = word.rfind(['/', '\\']).map_or(quote, |at| at + 1);
            format!("{}{}", &word[..quote], &word[name..])
        }
        false => word.to_owned(),
    });
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_and_folders_go() {
        assert_eq!(strip("cannot read /a b/c/m.gguf: at 7"), "cannot read a m.gguf: at 7");
        assert_eq!(strip("`/x/y.gguf`: damaged"), "`y.gguf`: damaged");
        assert_eq!(strip("nothing"), "nothing");
    }
}

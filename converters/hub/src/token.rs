//! Access tokens, as they are found in variables, files and command lines.

use std::fmt;

use crate::HubError;

/// A token and where it was found. Neither `Debug` nor any error shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    text: String,
    origin: String,
}

impl Token {
    /// The token in `bytes`, which `origin` held; `None` where nothing is left of them.
    ///
    /// Spaces, line breaks and byte-order marks come from editors and copying and are no part of it; UTF-16 comes from
    /// shells of Windows. Whether the rest can be a token is found out when it is used.
    pub fn new(bytes: &[u8], origin: impl Into<String>) -> Option<Token> {
        let text = decode(bytes).replace(['\r', '\n'], "");
        let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}').to_owned();
        (!text.is_empty()).then(|| Token { text, origin: origin.into() })
    }

    /// What goes into `Authorization`.
    ///
    /// # Errors
    /// [`HubError::InvalidToken`] where it holds a character that no token has (RFC 6750; a colon, too, for mirrors).
    pub(crate) fn bearer(&self) -> Result<String, HubError> {
        match self.text.chars().find(|c| !c.is_ascii_alphanumeric() && !"-._~+/=:".contains(*c)) {
            Some(found) => Err(HubError::InvalidToken { origin: self.origin.clone(), found }),
            None => Ok(format!("Bearer {}", self.text)),
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(of {})", self.origin)
    }
}

fn decode(bytes: &[u8]) -> String {
    let utf16 = |unit: fn([u8; 2]) -> u16| {
        let units: Vec<u16> = bytes[2..].chunks_exact(2).map(|pair| unit([pair[0], pair[1]])).collect();
        String::from_utf16_lossy(&units)
    };
    match bytes {
        [0xff, 0xfe, ..] => utf16(u16::from_le_bytes),
        [0xfe, 0xff, ..] => utf16(u16::from_be_bytes),
        _ => String::from_utf8_lossy(bytes).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(bytes: &[u8]) -> String {
        Token::new(bytes, "HF_TOKEN").unwrap().bearer().unwrap()
    }

    #[test]
    fn what_editors_and_shells_add_is_no_part_of_a_token() {
        for text in ["hf_abc", " hf_abc\r\n\n", "\u{feff}hf_abc", "hf_\nabc\n"] {
            assert_eq!(bearer(text.as_bytes()), "Bearer hf_abc", "{text:?}");
        }
        let wide: Vec<u8> = "\u{feff}hf_abc\r\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(bearer(&wide), "Bearer hf_abc");
        for nothing in ["", " \n", "\u{feff}"] {
            assert_eq!(Token::new(nothing.as_bytes(), "x"), None);
        }
    }

    #[test]
    fn a_character_that_no_token_has_is_named_and_the_token_is_not() {
        let cases: [(&[u8], &str); 5] = [
            ("\u{201c}hf_abc\u{201d}".as_bytes(), "U+201C"),
            (b"'hf_abc'", "U+0027"),
            (b"hf abc", "U+0020"),
            ("hf_abc\u{200b}".as_bytes(), "U+200B"),
            (b"hf_abc\xff", "U+FFFD"),
        ];
        for (bytes, code) in cases {
            let token = Token::new(bytes, "HF_TOKEN").unwrap();
            let error = token.bearer().unwrap_err().to_string();
            assert!(error.contains("the token of HF_TOKEN") && error.contains(code), "{error}");
            assert!(!error.contains("abc") && !format!("{token:?}").contains("abc"));
        }
    }
}

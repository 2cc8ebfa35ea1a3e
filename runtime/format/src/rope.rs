//! When a request for scaled rotary positions asks for nothing: one rule for GGUF keys and for `config.json`.

/// How a model's description asks for scaled rotary positions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RopeScaling<'a> {
    /// Its kind, as `yarn`; in `config.json` `rope_type` or, in older ones, `type`.
    pub kind: Option<&'a str>,
    /// By how much positions are stretched; 0 means that nothing is stated.
    pub factor: Option<f64>,
    /// What attention scores are multiplied with; 0 means that nothing is stated.
    pub attention_factor: Option<f64>,
}

impl RopeScaling<'_> {
    /// Whether positions are as without any scaling. Kinds whose positions differ even with a factor of 1, and kinds
    /// that are not known, are not plain.
    pub fn is_plain(&self) -> bool {
        let neutral = |factor: Option<f64>| matches!(factor, None | Some(0.0 | 1.0));
        match self.kind {
            Some("none" | "default") => true,
            // A factor without a kind is linear scaling, in ggml and in the older `config.json` alike. A stretch that
            // is not stated is not known to be 1 where the kind says that there is one.
            None => neutral(self.factor) && neutral(self.attention_factor),
            Some("linear" | "yarn" | "dynamic" | "llama3") => {
                self.factor == Some(1.0) && neutral(self.attention_factor)
            }
            Some(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changes_no_position_is_plain() {
        let plain = |kind, factor, attention_factor| RopeScaling { kind, factor, attention_factor }.is_plain();
        assert!(RopeScaling::default().is_plain());
        assert!(plain(Some("none"), Some(4.0), None));
        assert!(plain(Some("default"), None, None));
        assert!(plain(Some("yarn"), Some(1.0), None));
        assert!(plain(None, Some(1.0), Some(1.0)));
        assert!(!plain(None, Some(4.0), None));
        assert!(!plain(Some("yarn"), Some(4.0), None));
        assert!(!plain(Some("yarn"), Some(1.0), Some(1.2)));
        assert!(!plain(Some("linear"), None, None));
        assert!(!plain(Some("longrope"), Some(1.0), None));
        assert!(!plain(Some("linear"), Some(f64::NAN), None));
    }
}

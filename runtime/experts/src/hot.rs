//! Which experts of a model are used most, as a file: what a cache is filled with before the first token.
//!
//! Owns the format, a JSON object of a few kilobytes: `{"hot_experts": 1, "model": …, "uses": [[…], …]}` with, for each layer and each
//! of its experts, how often it was used. Refuses whatever is not exactly that. It decides nothing that anybody gets to see: a
//! wrong list costs reads and changes no byte.

use serde::{Deserialize, Serialize};

/// The format's version.
const VERSION: u32 = 1;
/// No model has so many experts that a list of them is longer.
const MAX_BYTES: usize = 16 << 20;

/// How often each expert of a model was used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hot {
    hot_experts: u32,
    model: String,
    uses: Vec<Vec<u64>>,
}

/// Why there is no list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HotError {
    /// It is not of this format.
    #[error("it is no list of hot experts: {0}")]
    Format(String),
    /// It is of another version.
    #[error("it is a list of hot experts of version {0}, expected {VERSION}")]
    Version(u32),
}

impl Hot {
    /// The list of `uses`, `[n_layers][n_experts]`, of the model with that fingerprint.
    pub fn new(model: impl Into<String>, uses: Vec<Vec<u64>>) -> Self {
        Self { hot_experts: VERSION, model: model.into(), uses }
    }

    /// Reads what [`Hot::to_json`] wrote.
    ///
    /// # Errors
    /// [`HotError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, HotError> {
        if bytes.len() > MAX_BYTES {
            return Err(HotError::Format(format!("it has {} bytes", bytes.len())));
        }
        let hot: Self = serde_json::from_slice(bytes).map_err(|error| HotError::Format(error.to_string()))?;
        if hot.hot_experts == VERSION { Ok(hot) } else { Err(HotError::Version(hot.hot_experts)) }
    }

    /// The file's text.
    pub fn to_json(&self) -> String {
        // Numbers and a string can always be written.
        serde_json::to_string(self).unwrap_or_default() + "\n"
    }

    /// Whether it is of the model with that fingerprint, and has a number for each of its experts.
    pub fn is_of(&self, model: &str, n_layers: usize, n_experts: usize) -> bool {
        self.model == model && self.uses.len() == n_layers && self.uses.iter().all(|layer| layer.len() == n_experts)
    }

    /// Experts that were used, as (layer, expert), the most used first; where two are equal, the one that comes first in the model.
    pub fn order(&self) -> Vec<(usize, u32)> {
        let of_layer = |(layer, uses): (usize, &Vec<u64>)| {
            let of_expert = move |(expert, &n): (u32, &u64)| (n > 0).then_some((n, layer, expert));
            (0..).zip(uses).filter_map(of_expert).collect::<Vec<_>>()
        };
        let mut all: Vec<(u64, usize, u32)> = self.uses.iter().enumerate().flat_map(of_layer).collect();
        all.sort_by_key(|&(n, layer, expert)| (std::cmp::Reverse(n), layer, expert));
        all.into_iter().map(|(_, layer, expert)| (layer, expert)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_as_it_was_written() {
        let hot = Hot::new("ab12", vec![vec![0, 7, 7], vec![9, 0, 1]]);
        assert_eq!(Hot::parse(hot.to_json().as_bytes()), Ok(hot.clone()));
        assert_eq!(hot.order(), [(1, 0), (0, 1), (0, 2), (1, 2)]);
        assert!(hot.is_of("ab12", 2, 3));
        assert!(!hot.is_of("ab13", 2, 3) && !hot.is_of("ab12", 3, 3) && !hot.is_of("ab12", 2, 4));
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for text in ["", "7", "{}", "[[1]]", "{\"hot_experts\":1,\"model\":\"a\",\"uses\":[[-1]]}"] {
            assert!(matches!(Hot::parse(text.as_bytes()), Err(HotError::Format(_))), "{text}");
        }
        let more = "{\"hot_experts\":1,\"model\":\"a\",\"uses\":[],\"more\":1}";
        assert!(matches!(Hot::parse(more.as_bytes()), Err(HotError::Format(_))));
        let later = "{\"hot_experts\":2,\"model\":\"a\",\"uses\":[]}";
        assert_eq!(Hot::parse(later.as_bytes()), Err(HotError::Version(2)));
    }
}

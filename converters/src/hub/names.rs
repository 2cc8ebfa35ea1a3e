//! Names: repositories and their aliases, revisions, file names inside a repository, patterns, addresses.
//!
//! Every name that came from a server or a person passes here before it becomes part of a path or of an
//! address; whatever could leave its folder is refused.

use std::fmt;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use super::HubError;

/// Short names and the repositories they stand for.
pub const ALIASES: [(&str, &str); 2] =
    [("4b", "PowerInfer/SmallThinker-4BA0.6B-Instruct"), ("21b", "PowerInfer/SmallThinker-21BA3B-Instruct")];

/// What a conversion reads: weights and their index, configuration, tokenizer, chat template.
pub const DEFAULT_INCLUDE: [&str; 6] =
    ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"];

/// A model repository on the hub, `owner/name`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RepoId(String);

impl RepoId {
    /// Reads an alias ([`ALIASES`]) or `owner/name`.
    ///
    /// # Errors
    /// [`HubError::InvalidName`] where it is neither.
    pub fn parse(text: &str) -> Result<RepoId, HubError> {
        if let Some((_, repo)) = ALIASES.iter().find(|(alias, _)| alias.eq_ignore_ascii_case(text)) {
            return Ok(RepoId((*repo).to_owned()));
        }
        let invalid = |reason| Err(HubError::InvalidName { name: text.to_owned(), reason });
        let Some((owner, name)) = text.split_once('/') else {
            return invalid("it is no alias, and `owner/name` has a slash");
        };
        for part in [owner, name] {
            if part.is_empty() || part.len() > 96 {
                return invalid("owner and name have 1 to 96 characters");
            }
            if !part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
                return invalid("owner and name are made of letters, digits, `-`, `_` and `.`");
            }
            if part.starts_with(['.', '-']) || part.ends_with(['.', '-']) || part.contains("..") || part.contains("--")
            {
                return invalid("`-` and `.` may not stand first, last or doubled");
            }
        }
        Ok(RepoId(text.to_owned()))
    }

    /// `owner/name`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The known repository whose name differs least from `repo`, if it differs little.
pub(super) fn closest_known(repo: &str) -> Option<String> {
    let wanted = repo.to_ascii_lowercase();
    let wanted_name = wanted.rsplit('/').next().unwrap_or(&wanted);
    ALIASES
        .iter()
        .filter(|(_, known)| !known.eq_ignore_ascii_case(repo))
        .map(|(alias, known)| {
            let known_lower = known.to_ascii_lowercase();
            let known_name = known_lower.rsplit('/').next().unwrap_or(&known_lower);
            (edit_distance(wanted_name, known_name), known_name.len(), alias, known)
        })
        .filter(|(distance, len, ..)| *distance <= len / 2)
        .min_by_key(|(distance, ..)| *distance)
        .map(|(_, _, alias, known)| format!("{known} (`{alias}`)"))
}

/// Levenshtein distance in bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Refuses revisions that could not be a git reference, in particular those that would climb out of `refs/`.
pub(super) fn check_revision(revision: &str) -> Result<(), HubError> {
    let invalid = |reason| Err(HubError::InvalidRevision { revision: revision.to_owned(), reason });
    if revision.is_empty() || revision.len() > 255 {
        return invalid("it has 1 to 255 characters");
    }
    if revision.contains('\\') || revision.chars().any(char::is_control) {
        return invalid("it may not contain backslashes or control characters");
    }
    if revision.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return invalid("its parts may not be empty, `.` or `..`");
    }
    Ok(())
}

/// Whether the text is a full commit hash.
pub(super) fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

/// Whether the text is `len` lowercase hexadecimal digits.
pub(super) fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Refuses file names that would be written outside the folder they are joined to, on any system.
pub(super) fn check_file_name(path: &str) -> Result<(), HubError> {
    let unsafe_part =
        |part: &str| part.is_empty() || part == "." || part == ".." || part.len() > 255 || part.contains(['\\', ':']);
    if path.len() > 1024 || path.chars().any(char::is_control) || path.split('/').any(unsafe_part) {
        return Err(HubError::UnsafePath { path: path.chars().take(300).collect() });
    }
    Ok(())
}

/// Which files of a repository are wanted.
#[derive(Debug)]
pub(super) struct Include {
    set: GlobSet,
    patterns: Vec<String>,
    is_default: bool,
}

impl Include {
    /// The given patterns, or [`DEFAULT_INCLUDE`] for the top folder where there are none.
    ///
    /// Given patterns mean what they mean to the Hugging Face tools: `*` matches `/` too, and `dir/` is everything
    /// under it.
    pub(super) fn new(patterns: &[String]) -> Result<Include, HubError> {
        let is_default = patterns.is_empty();
        let patterns: Vec<String> = if is_default {
            DEFAULT_INCLUDE.iter().map(|p| (*p).to_owned()).collect()
        } else {
            patterns.iter().map(|p| if p.ends_with('/') { format!("{p}*") } else { p.clone() }).collect()
        };
        let invalid = |pattern: &str| {
            let pattern = pattern.to_owned();
            move |source| HubError::InvalidPattern { pattern, source }
        };
        let mut set = GlobSetBuilder::new();
        for pattern in &patterns {
            let mut glob = GlobBuilder::new(pattern);
            glob.literal_separator(is_default);
            set.add(glob.build().map_err(invalid(pattern))?);
        }
        let set = set.build().map_err(invalid(&patterns.join(", ")))?;
        Ok(Include { set, patterns, is_default })
    }

    pub(super) fn matches(&self, path: &str) -> bool {
        self.set.is_match(path)
    }

    /// Whether nothing was asked for in particular.
    pub(super) fn is_default(&self) -> bool {
        self.is_default
    }

    /// The patterns, for a message.
    pub(super) fn describe(&self) -> String {
        self.patterns.join(", ")
    }
}

/// Percent-encodes everything but unreserved characters and `/`.
pub(super) fn encode_path(path: &str) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut out = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push(char::from(HEX[usize::from(byte >> 4)]));
            out.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_and_repositories_parse() {
        assert_eq!(RepoId::parse("4b").unwrap().as_str(), "PowerInfer/SmallThinker-4BA0.6B-Instruct");
        assert_eq!(RepoId::parse("21B").unwrap().as_str(), "PowerInfer/SmallThinker-21BA3B-Instruct");
        assert_eq!(RepoId::parse("a_b/c.d-e").unwrap().as_str(), "a_b/c.d-e");
    }

    #[test]
    fn names_that_could_become_other_paths_are_refused() {
        for name in ["", "8b", "/", "a/", "/b", "a/b/c", "../b", "a/..", "a/b--c", "a/b c", "a/b%2f", ".a/b", "a/b."] {
            assert!(RepoId::parse(name).is_err(), "{name:?} was accepted");
        }
        for revision in ["", "..", "a/../b", "/etc", "a//b", "a\\b", "a\nb", "."] {
            assert!(check_revision(revision).is_err(), "{revision:?} was accepted");
        }
        for path in ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "C:/x", "a\\..\\b", "a/\0", "a\nb", "a/"] {
            assert!(check_file_name(path).is_err(), "{path:?} was accepted");
        }
    }

    #[test]
    fn ordinary_names_are_accepted() {
        for revision in ["main", "refs/pr/3", "v1.0", "é+#"] {
            check_revision(revision).unwrap();
        }
        for path in ["config.json", "sub folder/モデル.safetensors", "a..b", "...", "x#y?.json"] {
            check_file_name(path).unwrap();
        }
    }

    #[test]
    fn a_near_miss_proposes_the_known_repository() {
        let hint = closest_known("PowerInfer/SmallThinker-4B-A0.6B-Instruct").unwrap();
        assert_eq!(hint, "PowerInfer/SmallThinker-4BA0.6B-Instruct (`4b`)");
        let hint = closest_known("powerinfer/smallthinker-21b-instruct").unwrap();
        assert!(hint.ends_with("(`21b`)"), "{hint}");
        assert_eq!(closest_known("meta-llama/Llama-3"), None);
    }

    #[test]
    fn default_patterns_take_the_top_folder_and_given_ones_take_all() {
        let default = Include::new(&[]).unwrap();
        for path in ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"] {
            assert!(default.matches(path), "{path}");
        }
        for path in ["README.md", "onnx/config.json", "pytorch_model.bin", "modeling_smallthinker.py"] {
            assert!(!default.matches(path), "{path}");
        }
        let given = Include::new(&["*.json".into(), "docs/".into()]).unwrap();
        assert!(
            given.matches("onnx/config.json") && given.matches("docs/a/b.md") && !given.matches("model.safetensors")
        );
        assert!(Include::new(&["a[".into()]).is_err());
    }

    #[test]
    fn encoding_keeps_slashes_and_escapes_the_rest() {
        assert_eq!(encode_path("a b/ü#?%.json"), "a%20b/%C3%BC%23%3F%25.json");
    }
}

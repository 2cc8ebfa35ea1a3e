//! Names: repositories and their aliases, revisions, file names inside a repository, patterns, addresses.
//!
//! Every name that came from a server or a person passes here before it becomes part of a path or of an
//! address; whatever could leave its folder is refused.

use std::fmt;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::HubError;
use crate::address::without_secrets;

/// A model that has a short name.
#[derive(Debug)]
pub struct Alias {
    /// The short name.
    pub short: &'static str,
    /// Where the model is now.
    pub repo: &'static str,
    /// Where it was before: caches may have it under this name, and mirrors may know no other.
    pub former: &'static str,
    /// Where its authors publish it as GGUF.
    pub gguf: &'static [&'static str],
}

/// Short names and the repositories they stand for.
pub const ALIASES: [Alias; 2] = [
    Alias {
        short: "4b",
        repo: "Tiiny/SmallThinker-4BA0.6B-Instruct",
        former: "PowerInfer/SmallThinker-4BA0.6B-Instruct",
        gguf: &["Tiiny/SmallThinker-4BA0.6B-Instruct-GGUF", "Tiiny/SmallThinker-4BA0.6B-Instruct-INT4-QAT"],
    },
    Alias {
        short: "21b",
        repo: "Tiiny/SmallThinker-21BA3B-Instruct",
        former: "PowerInfer/SmallThinker-21BA3B-Instruct",
        gguf: &["Tiiny/SmallThinker-21BA3B-Instruct-GGUF"],
    },
];

/// The authors' organisation, and what it was called before.
const OWNERS: [(&str, &str); 2] = [("Tiiny", "PowerInfer"), ("PowerInfer", "Tiiny")];

/// What a conversion reads: weights and their index, configuration, tokenizer, chat template.
pub const DEFAULT_INCLUDE: [&str; 7] = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
];

/// A model repository on the hub, `owner/name`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RepoId(String);

impl RepoId {
    /// Reads an alias ([`ALIASES`]) or `owner/name`.
    ///
    /// # Errors
    /// [`HubError::InvalidName`] where it is neither.
    pub fn parse(text: &str) -> Result<RepoId, HubError> {
        match ALIASES.iter().find(|alias| alias.short.eq_ignore_ascii_case(text)) {
            Some(alias) => Ok(RepoId(alias.repo.to_owned())),
            None => RepoId::owner_and_name(text),
        }
    }

    /// Reads `owner/name` alone.
    pub(crate) fn owner_and_name(text: &str) -> Result<RepoId, HubError> {
        let invalid = |reason| Err(HubError::InvalidName { name: without_secrets(text), reason });
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

    /// The alias of this model, under its present name or its former one.
    pub fn alias(&self) -> Option<&'static Alias> {
        ALIASES.iter().find(|alias| [alias.repo, alias.former].iter().any(|name| name.eq_ignore_ascii_case(&self.0)))
    }

    /// The name that the same model is known by besides this one.
    pub(crate) fn other_name(&self) -> Option<RepoId> {
        // The authors' organisation has moved with all that it has.
        let (owner, name) = self.0.split_once('/')?;
        let (_, other) = OWNERS.into_iter().find(|(known, _)| known.eq_ignore_ascii_case(owner))?;
        let known = ALIASES.iter().flat_map(|alias| alias.gguf.iter().chain([&alias.repo]));
        let is_known = known.filter_map(|repo| repo.split_once('/')).any(|(_, known)| known.eq_ignore_ascii_case(name));
        is_known.then(|| RepoId(format!("{other}/{name}")))
    }

    /// Whether both are one repository, perhaps by its former name.
    pub fn is_same(&self, other: &RepoId) -> bool {
        self.names().iter().any(|name| name.0.eq_ignore_ascii_case(&other.0))
    }

    /// All names that the model is known by, this one first.
    pub(crate) fn names(&self) -> Vec<RepoId> {
        std::iter::once(self.clone()).chain(self.other_name()).collect()
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

/// The known model whose repository's name differs least from `repo`, if it differs little and is another.
pub fn closest_known(repo: &str) -> Option<&'static Alias> {
    let name = |repo: &str| repo.rsplit('/').next().unwrap_or(repo).to_ascii_lowercase();
    let wanted = name(repo);
    ALIASES
        .iter()
        .map(|alias| (edit_distance(&wanted, &name(alias.repo)), name(alias.repo).len(), alias))
        .filter(|(distance, len, _)| *distance <= len / 2)
        .min_by_key(|(distance, ..)| *distance)
        .map(|(.., alias)| alias)
        // Whoever wrote its name exactly meant it.
        .filter(|alias| ![alias.repo, alias.former].iter().any(|known| known.eq_ignore_ascii_case(repo)))
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
pub(crate) fn check_revision(revision: &str) -> Result<(), HubError> {
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
pub(crate) fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

/// Whether the text is `len` lowercase hexadecimal digits.
pub(crate) fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Refuses file names that would be written outside the folder they are joined to, on any system.
pub(crate) fn check_file_name(path: &str) -> Result<(), HubError> {
    let unsafe_part =
        |part: &str| part.is_empty() || part == "." || part == ".." || part.len() > 255 || part.contains(['\\', ':']);
    if path.len() > 1024 || path.chars().any(char::is_control) || path.split('/').any(unsafe_part) {
        return Err(HubError::UnsafePath { path: path.chars().take(300).collect() });
    }
    Ok(())
}

/// Which files of a repository are wanted.
#[derive(Debug)]
pub(crate) struct Include {
    set: GlobSet,
    patterns: Vec<String>,
    is_default: bool,
}

impl Include {
    /// The given patterns, or [`DEFAULT_INCLUDE`] for the top folder where there are none.
    ///
    /// Given patterns mean what they mean to the Hugging Face tools: `*` matches `/` too, and `dir/` is everything
    /// under it.
    pub(crate) fn new(patterns: &[String]) -> Result<Include, HubError> {
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

    pub(crate) fn matches(&self, path: &str) -> bool {
        self.set.is_match(path)
    }

    /// Whether nothing was asked for in particular.
    pub(crate) fn is_default(&self) -> bool {
        self.is_default
    }

    /// The patterns, for a message.
    pub(crate) fn describe(&self) -> String {
        self.patterns.join(", ")
    }
}

/// The pattern that matches this path and no other.
pub fn literal(path: &str) -> String {
    globset::escape(path)
}

/// Percent-encodes everything but unreserved characters and `/`.
pub(crate) fn encode_path(path: &str) -> String {
    const ESCAPED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');
    utf8_percent_encode(path, &ESCAPED).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_and_repositories_parse() {
        assert_eq!(RepoId::parse("4b").unwrap().as_str(), "Tiiny/SmallThinker-4BA0.6B-Instruct");
        assert_eq!(RepoId::parse("21B").unwrap().as_str(), "Tiiny/SmallThinker-21BA3B-Instruct");
        assert_eq!(RepoId::parse("a_b/c.d-e").unwrap().as_str(), "a_b/c.d-e");
    }

    #[test]
    fn a_known_model_goes_by_both_its_names() {
        let names = |text: &str| RepoId::parse(text).unwrap().names();
        let [new, old] = [ALIASES[0].repo, ALIASES[0].former].map(|name| RepoId::parse(name).unwrap());
        assert_eq!(names("4b"), [new.clone(), old.clone()]);
        assert_eq!(names(old.as_str()), [old, new]);
        assert_eq!(names("a/b"), [RepoId::parse("a/b").unwrap()]);
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
    fn what_an_address_hides_is_not_repeated() {
        for name in ["https://me:Passw0rd@hub/a/b?token=Passw0rd", "me:Passw0rd@hub/a", "ftp://Passw0rd@h"] {
            let error = RepoId::parse(name).unwrap_err().to_string();
            assert!(!error.contains("Passw0rd") && error.contains('h'), "{error}");
        }
        assert!(RepoId::parse("a/b@c/d").unwrap_err().to_string().contains("a/b@c/d"));
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
        let near = |repo| closest_known(repo).map(|alias| alias.short);
        assert_eq!(near("PowerInfer/SmallThinker-4B-A0.6B-Instruct"), Some("4b"));
        assert_eq!(near("tiiny/smallthinker-21b-instruct"), Some("21b"));
        assert_eq!(near("meta-llama/Llama-3"), None);
        assert_eq!(near(ALIASES[0].repo), None);
    }

    #[test]
    fn default_patterns_take_the_top_folder_and_given_ones_take_all() {
        let default = Include::new(&[]).unwrap();
        for path in [
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
        ] {
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

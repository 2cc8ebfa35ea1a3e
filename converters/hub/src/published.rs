//! The GGUF files of a repository: which are one model in parts, and which is of the type that a person asks for.
//!
//! Types are known by the names that files have; nothing is opened. What is in a file is for whoever runs it.

use crate::{HubError, ListedFile};

/// A type of weights as a person writes it: case, `-`, `_` and `.` make no difference.
#[derive(Debug, Clone)]
pub struct TypeTag {
    written: String,
    plain: String,
}

impl PartialEq for TypeTag {
    fn eq(&self, other: &Self) -> bool {
        self.plain == other.plain
    }
}

impl Eq for TypeTag {}

impl TypeTag {
    /// Reads `q4_0`, `Q4-K-M` and the like.
    ///
    /// # Errors
    /// [`HubError::InvalidName`] for what cannot stand at the end of a file's name.
    pub fn parse(text: &str) -> Result<TypeTag, HubError> {
        let letters = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || is_separator(byte));
        let plain = plain(text);
        // What is none could be the end of one: `K_M`.
        let begins = plain.trim_start_matches(|c: char| c.is_ascii_alphabetic());
        let is_type = begins.len() < plain.len() && begins.starts_with(|c: char| c.is_ascii_digit());
        if !is_type || !letters || text.len() > 40 {
            let reason = "a type begins with letters and a digit, as `q4_0`, and is made of these, `-`, `_` and `.`";
            return Err(HubError::InvalidName { name: text.to_owned(), reason });
        }
        Ok(TypeTag { written: text.to_owned(), plain })
    }

    /// Whether a file whose name without its ending is `stem` is of this type: it ends with the type, after a separator.
    pub fn ends(&self, stem: &str) -> bool {
        let starts = stem.bytes().enumerate().filter(|&(_, byte)| is_separator(byte)).map(|(at, _)| at + 1);
        starts.chain([0]).any(|at| plain(&stem[at..]) == self.plain)
    }
}

impl std::fmt::Display for TypeTag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.written)
    }
}

fn is_separator(byte: u8) -> bool {
    b"-_.".contains(&byte)
}

fn plain(text: &str) -> String {
    text.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

/// A model that a repository has as GGUF: one file, or all parts of a split one in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The name without folder, number of the part and ending.
    pub stem: String,
    /// Its files; the first is the one to open.
    pub files: Vec<ListedFile>,
}

impl Published {
    /// The models among `files`, those with the shortest names first. Left out: files for the authors' own engine, and
    /// what is no model (importance matrices, projectors); split ones that are not whole.
    pub fn all(files: &[ListedFile]) -> Vec<Published> {
        let mut all: Vec<(String, u32, Published)> = Vec::new();
        let mut files: Vec<&ListedFile> = files.iter().collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        for file in files {
            let (folder, name) = file.path.rsplit_once('/').unwrap_or(("", &file.path));
            let Some((stem, ending)) = name.rsplit_once('.') else { continue };
            if !ending.eq_ignore_ascii_case("gguf") || is_no_model(stem) {
                continue;
            }
            let (stem, number, count) = part_of(stem).unwrap_or((stem, 1, 1));
            let key = format!("{folder}/{stem}/{count}");
            match all.iter_mut().find(|(other, ..)| *other == key) {
                Some((_, _, whole)) if number as usize == whole.files.len() + 1 => whole.files.push(file.clone()),
                None if number == 1 => {
                    all.push((key, count, Published { stem: stem.to_owned(), files: vec![file.clone()] }));
                }
                _ => {}
            }
        }
        all.retain(|(_, count, model)| model.files.len() == *count as usize);
        let mut all: Vec<Published> = all.into_iter().map(|(.., model)| model).collect();
        all.sort_by(|a, b| (a.stem.len(), &a.stem).cmp(&(b.stem.len(), &b.stem)));
        all
    }

    /// The first of `all` that is of type `ty`.
    pub fn of_type<'p>(all: &'p [Published], ty: &TypeTag) -> Option<&'p Published> {
        all.iter().find(|model| ty.ends(&model.stem))
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).fold(0, u64::saturating_add)
    }

    /// Bytes that have to be transferred.
    pub fn missing_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size - file.on_disk).fold(0, u64::saturating_add)
    }
}

/// Whether the file is for the authors' own engine, or not a model at all. A name may begin with that of the authors.
fn is_no_model(stem: &str) -> bool {
    let words: Vec<String> = stem.split(['-', '_', '.']).map(str::to_ascii_lowercase).collect();
    words.iter().skip(1).any(|word| ["powerinfer", "imatrix"].contains(&word.as_str()))
        || words.iter().any(|word| word == "mmproj")
}

/// `NAME-00002-of-00003`: the name, the number and the count.
fn part_of(stem: &str) -> Option<(&str, u32, u32)> {
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (name, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?;
    Some((name, digits(number)?, digits(count).filter(|&count| count > 0)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(paths: &[&str]) -> Vec<ListedFile> {
        paths.iter().map(|path| ListedFile { path: (*path).to_owned(), size: 10, on_disk: 3 }).collect()
    }

    fn found(paths: &[&str], ty: &str) -> Option<String> {
        let all = Published::all(&listed(paths));
        Published::of_type(&all, &TypeTag::parse(ty).unwrap()).map(|model| model.files[0].path.clone())
    }

    #[test]
    fn a_type_is_found_however_it_is_spelled() {
        let paths = [
            "SmallThinker-4B-A0.6B-Instruct.Q4_0.gguf",
            "SmallThinker-4B-A0.6B-Instruct.Q4_0.powerinfer.gguf",
            "SmallThinker-4B-A0.6B-Instruct.Q4_K.gguf",
            "SmallThinker-4B-A0.6B-Instruct.Q4_K_S.gguf",
            "SmallThinker-4B-A0.6B-Instruct-imatrix.gguf",
            "README.md",
        ];
        for ty in ["q4_0", "Q4_0", "q40", "Q4-0", "q4.0"] {
            assert_eq!(found(&paths, ty).as_deref(), Some(paths[0]), "{ty}");
        }
        assert_eq!(found(&paths, "q4_k").as_deref(), Some(paths[2]));
        assert_eq!(found(&paths, "Q4KS").as_deref(), Some(paths[3]));
        assert_eq!(found(&paths, "q4_k_m"), None);
        assert_eq!(Published::all(&listed(&paths)).len(), 3);
    }

    #[test]
    fn the_shortest_name_wins_and_the_authors_name_in_front_harms_nothing() {
        let paths = ["PowerInfer_M-Instruct-bf16_q8_0.gguf", "PowerInfer_M-Instruct-q8_0.gguf", "a/M-mmproj-q8_0.gguf"];
        assert_eq!(found(&paths, "Q8_0").as_deref(), Some(paths[1]));
        assert_eq!(found(&paths, "bf16_q8_0").as_deref(), Some(paths[0]));
    }

    #[test]
    fn parts_are_one_model_where_all_are_there() {
        let paths = ["Q8_0/M-Q8_0-00002-of-00002.gguf", "Q8_0/M-Q8_0-00001-of-00002.gguf", "M-F16-00001-of-00002.gguf"];
        let all = Published::all(&listed(&paths));
        assert_eq!(all.len(), 1, "{all:?}");
        assert_eq!(all[0].files.iter().map(|file| &*file.path).collect::<Vec<_>>(), [paths[1], paths[0]]);
        assert_eq!((all[0].bytes(), all[0].missing_bytes()), (20, 14));
    }

    #[test]
    fn what_is_no_type_is_refused() {
        for text in ["", "_", "q4 0", "../x", "q4/0", "é", "0", "4_0", "K_M", "powerinfer", "imatrix"] {
            assert!(TypeTag::parse(text).is_err(), "{text:?}");
        }
    }
}

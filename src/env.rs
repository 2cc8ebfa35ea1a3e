//! Everything that is taken from the environment, read in one place.
//!
//! The variables of the Hugging Face tools mean here what they mean there, so that one cache and one login serve both.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

use st_hub::{DEFAULT_ENDPOINT, Proxies, Token};

/// The variable that names the person's folder; the Hugging Face tools take the same.
const HOME: &str = if cfg!(windows) { "USERPROFILE" } else { "HOME" };

/// The environment, as far as it matters.
#[derive(Debug)]
pub(crate) struct Env {
    /// The folder with `models--owner--name` folders.
    pub(crate) hub_cache: PathBuf,
    /// The folder of what this program converted for itself.
    pub(crate) store: PathBuf,
    /// Where the token file lies that `hf auth login` leaves.
    token_path: PathBuf,
    token: Option<Token>,
    /// Address of the hub.
    pub(crate) hub_endpoint: String,
    /// Whether the hub may not be asked.
    pub(crate) offline: bool,
    /// Proxies for connections.
    pub(crate) proxies: Proxies,
    /// What requests to a server must bring.
    pub(crate) api_key: Option<String>,
    /// Whether colours are unwanted.
    pub(crate) no_color: bool,
}

impl Env {
    /// Reads the environment of the process.
    pub(crate) fn read() -> Self {
        Self::from_vars(|name| env::var_os(name))
    }

    fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Self {
        let set = |name: &str| var(name).filter(|value| !value.is_empty());
        let path = |name: &str| set(name).map(PathBuf::from).map(|path| expand_home(path, set(HOME)));
        let text = |name: &str| set(name).and_then(|value| value.into_string().ok());
        let home = PathBuf::from(set(HOME).unwrap_or_else(|| ".".into()));
        let cache = path("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache"));
        let hf_home = path("HF_HOME").unwrap_or_else(|| cache.join("huggingface"));
        let hub_cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let endpoint = text("HF_ENDPOINT").map(|endpoint| endpoint.trim_end_matches('/').to_owned());
        let token = |name: &str| set(name).and_then(|value| Token::new(value.as_encoded_bytes(), name));
        // One that is empty hides another, so it is passed on, too.
        let proxy = |name: &str| var(name).map(|value| value.to_string_lossy().into_owned());
        let offline = text("HF_HUB_OFFLINE").or_else(|| text("TRANSFORMERS_OFFLINE"));
        Self {
            hub_cache: hub_cache.unwrap_or_else(|| hf_home.join("hub")),
            store: path("ST_TOOL_HOME").unwrap_or_else(|| cache.join("st-tool")),
            token_path: path("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token")),
            token: token("HF_TOKEN").or_else(|| token("HUGGING_FACE_HUB_TOKEN")),
            hub_endpoint: endpoint.unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned()),
            offline: offline.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str())),
            proxies: Proxies::from_variables(proxy),
            api_key: text("ST_TOOL_API_KEY"),
            no_color: set("NO_COLOR").is_some(),
        }
    }

    /// The hub token: of the environment, else of the token file.
    pub(crate) fn hub_token(&self) -> Option<Token> {
        let of_file = || Token::new(&std::fs::read(&self.token_path).ok()?, self.token_path.display().to_string());
        self.token.clone().or_else(of_file)
    }
}

fn expand_home(path: PathBuf, home: Option<OsString>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn env(vars: &[(&str, &str)]) -> Env {
        let vars: Vec<(String, OsString)> = vars.iter().map(|(k, v)| ((*k).to_owned(), OsString::from(v))).collect();
        Env::from_vars(|name| vars.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()))
    }

    #[test]
    fn the_cache_is_where_the_hugging_face_tools_have_it() {
        let cache = |vars: &[(&str, &str)]| env(vars).hub_cache;
        assert_eq!(cache(&[(HOME, "/h")]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(cache(&[(HOME, "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[(HOME, "/h"), ("HF_HOME", "/f")]), Path::new("/f/hub"));
        assert_eq!(cache(&[(HOME, "/h"), ("HF_HOME", "~/f")]), Path::new("/h/f/hub"));
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "")]), Path::new("/f/hub"));
    }

    #[test]
    fn the_store_is_in_the_cache_of_the_person() {
        let store = |vars: &[(&str, &str)]| env(vars).store;
        assert_eq!(store(&[(HOME, "/h")]), Path::new("/h/.cache/st-tool"));
        assert_eq!(store(&[(HOME, "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/st-tool"));
        assert_eq!(store(&[(HOME, "/h"), ("ST_TOOL_HOME", "~/s")]), Path::new("/h/s"));
    }

    #[test]
    fn switches_and_addresses() {
        for (value, offline) in [("1", true), ("on", true), ("True", true), ("0", false), ("no", false), ("", false)] {
            assert_eq!(env(&[("HF_HUB_OFFLINE", value)]).offline, offline, "{value}");
        }
        assert_eq!(env(&[]).hub_endpoint, "https://huggingface.co");
        assert_eq!(env(&[("HF_ENDPOINT", "http://localhost:1/")]).hub_endpoint, "http://localhost:1");
        assert!(env(&[("NO_COLOR", "1")]).no_color && !env(&[("NO_COLOR", "")]).no_color);
    }

    #[test]
    fn the_token_of_the_environment_comes_before_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("token");
        std::fs::write(&file, "from-file\n").expect("written");
        let home = folder.path().to_str().expect("UTF-8");
        let of_file = Token::new(b"from-file", file.display().to_string());
        assert_eq!(env(&[("HF_HOME", home)]).hub_token(), of_file);
        assert_eq!(env(&[("HF_HOME", home), ("HF_TOKEN", " \n")]).hub_token(), of_file);
        let of_variable = Token::new(b"t", "HF_TOKEN");
        assert_eq!(env(&[("HF_HOME", home), ("HF_TOKEN", " t\n")]).hub_token(), of_variable);
        assert_eq!(env(&[("HF_HOME", "/nonexistent")]).hub_token(), None);
    }
}

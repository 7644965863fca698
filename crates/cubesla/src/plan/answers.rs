//! Measured choices, in memory and in a file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{env, fs, io, process};

use etcetera::BaseStrategy;

/// Names the folder of the file; none if it is empty.
const CACHE_VARIABLE: &str = "CUBESLA_CACHE";

/// Why the file of measured choices is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheFault {
    /// It is there, and cannot be read or understood.
    #[error("the choices in {path} cannot be read and are measured anew: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// It cannot be written.
    #[error("choices cannot be kept in {path}: {reason}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The plan of each kind of call, by device.
type Table = BTreeMap<String, BTreeMap<String, String>>;

/// All answers that are known.
pub(super) struct Answers {
    path: Option<PathBuf>,
    table: Table,
    fault: Option<CacheFault>,
}

impl Answers {
    /// Those of the user's file.
    pub fn load() -> Self {
        Self::at(folder().map(|folder| folder.join("plans.json")))
    }

    fn at(path: Option<PathBuf>) -> Self {
        let (table, fault) = path.as_deref().map(read).unwrap_or_default();
        Self { path, table, fault }
    }

    /// The last thing that went wrong.
    pub fn fault(&self) -> Option<&CacheFault> {
        self.fault.as_ref()
    }

    pub fn get(&self, device: &str, kind: &str) -> Option<&str> {
        Some(self.table.get(device)?.get(kind)?)
    }

    /// Keeps an answer, beside those that other processes have written meanwhile.
    pub fn put(&mut self, device: &str, kind: &str, plan: String) {
        let Some(path) = &self.path else {
            insert(&mut self.table, device, kind, plan);
            return;
        };
        for (device, kinds) in read(path).0 {
            self.table.entry(device).or_default().extend(kinds);
        }
        insert(&mut self.table, device, kind, plan);
        if let Err(error) = write(path, &self.table) {
            self.fault = Some(CacheFault::Write {
                path: path.clone(),
                reason: error.to_string(),
            });
        }
    }
}

fn insert(table: &mut Table, device: &str, kind: &str, plan: String) {
    let kinds = table.entry(device.to_owned()).or_default();
    kinds.insert(kind.to_owned(), plan);
}

fn folder() -> Option<PathBuf> {
    match env::var_os(CACHE_VARIABLE) {
        Some(folder) if folder.is_empty() => None,
        Some(folder) => Some(folder.into()),
        None => {
            let user = etcetera::choose_base_strategy().ok()?;
            Some(user.cache_dir().join("cubesla"))
        }
    }
}

/// The table in a file: an empty one if there is none, or it cannot be read.
fn read(path: &Path) -> (Table, Option<CacheFault>) {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Default::default(),
        Err(error) => return (Table::new(), Some(unread(path, &error))),
    };
    match serde_json::from_str(&text) {
        Ok(table) => (table, None),
        Err(error) => (Table::new(), Some(unread(path, &error))),
    }
}

fn unread(path: &Path, error: &dyn std::error::Error) -> CacheFault {
    CacheFault::Read {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

/// Replaces the file at once, so that no one reads half of it.
fn write(path: &Path, table: &Table) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let new = path.with_extension(format!("{}.new", process::id()));
    fs::write(&new, serde_json::to_string_pretty(table)?)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> PathBuf {
        let folder = env::temp_dir().join(format!("cubesla-answers-{}-{name}", process::id()));
        folder.join("plans.json")
    }

    #[test]
    fn answers_of_two_processes_meet_in_the_file() {
        let path = path("meet");
        let [mut one, mut other] = [0, 1].map(|_| Answers::at(Some(path.clone())));
        one.put("card", "small", "a".into());
        other.put("card", "large", "b".into());
        assert_eq!(other.get("card", "small"), Some("a"));
        let later = Answers::at(Some(path.clone()));
        assert_eq!(later.get("card", "small"), Some("a"));
        assert_eq!(later.get("card", "large"), Some("b"));
        assert_eq!(later.get("other card", "large"), None);
        assert_eq!(later.fault(), None);
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_broken_file_is_written_anew() {
        let path = path("broken");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        for text in ["{\"card\": {\"small", "[1, 2]", "\u{0}"] {
            fs::write(&path, text).unwrap();
            let mut answers = Answers::at(Some(path.clone()));
            assert!(matches!(answers.fault(), Some(CacheFault::Read { .. })));
            assert_eq!(answers.get("card", "small"), None);
            answers.put("card", "small", "a".into());
            let later = Answers::at(Some(path.clone()));
            assert_eq!(later.get("card", "small"), Some("a"));
            assert_eq!(later.fault(), None);
        }
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_written_is_told_of() {
        // A folder where the file should be.
        let folder = path("folder");
        fs::create_dir_all(&folder).unwrap();
        let mut answers = Answers::at(Some(folder.clone()));
        answers.put("card", "small", "a".into());
        assert!(matches!(answers.fault(), Some(CacheFault::Write { .. })));
        assert_eq!(answers.get("card", "small"), Some("a"));
        fs::remove_dir_all(folder.parent().unwrap()).unwrap();
    }

    #[test]
    fn without_a_folder_answers_last_as_long_as_the_process() {
        let mut answers = Answers::at(None);
        answers.put("card", "small", "a".into());
        assert_eq!(answers.get("card", "small"), Some("a"));
        assert_eq!(answers.fault(), None);
    }
}

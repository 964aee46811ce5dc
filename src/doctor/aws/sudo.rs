//! Root by `sudo`, which does not take the caller's configuration along.

use std::path::{Path, PathBuf};

/// What there is of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Caller {
    /// `SUDO_USER`
    pub(super) name: String,
    /// The caller's home directory, where it is known.
    pub(super) home: Option<PathBuf>,
    /// Whether there is a configuration of AWS in it.
    pub(super) has_files: bool,
    /// Whether root has one.
    pub(super) root_has_files: bool,
}

impl Caller {
    /// Who called `sudo`, if somebody did.
    pub(super) fn find() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            return None;
        }
        let name = std::env::var("SUDO_USER").ok().filter(|name| !name.is_empty())?;
        if name == "root" {
            return None;
        }
        let user = nix::unistd::User::from_name(&name).ok().flatten();
        let home = user.map(|user| user.dir);
        let has = |home: &Path| {
            [".aws/config", ".aws/credentials"].iter().any(|file| home.join(file).exists())
        };
        let root = std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
        let own = ["AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"];
        let root_has_files = has(&root)
            || own.iter().filter_map(std::env::var_os).any(|file| Path::new(&file).exists());
        let has_files = home.as_deref().is_some_and(has);
        Some(Self { name, home, has_files, root_has_files })
    }

    /// What to do when root found no credentials.
    pub(super) fn advice(&self) -> Option<String> {
        if self.root_has_files {
            return None;
        }
        let Self { name, home, .. } = self;
        let keep = format!(
            "this is root by sudo, which does not see the configuration of {name}: `sudo --preserve-env=AWS_PROFILE,AWS_REGION,AWS_ACCESS_KEY_ID,AWS_SECRET_ACCESS_KEY,AWS_SESSION_TOKEN fspfs …` keeps what the environment has of it"
        );
        let Some(home) = home.as_ref().filter(|_| self.has_files) else { return Some(keep) };
        let home = home.display();
        Some(format!(
            "{keep}; `sudo HOME={home} AWS_PROFILE=… fspfs …` takes {name}'s files, SSO too; `sudo AWS_CONFIG_FILE={home}/.aws/config AWS_SHARED_CREDENTIALS_FILE={home}/.aws/credentials fspfs …` the files alone"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advice_names_the_files_of_the_caller() {
        let mut caller = Caller {
            name: "ann".to_owned(),
            home: Some("/home/ann".into()),
            has_files: true,
            root_has_files: false,
        };
        let advice = caller.advice().unwrap();
        for part in [
            "sudo --preserve-env=AWS_PROFILE,",
            "HOME=/home/ann AWS_PROFILE=",
            "AWS_CONFIG_FILE=/home/ann/.aws/config",
        ] {
            assert!(advice.contains(part), "{part}: {advice}");
        }
        caller.has_files = false;
        let advice = caller.advice().unwrap();
        assert!(
            advice.contains("sudo --preserve-env") && !advice.contains("AWS_CONFIG_FILE"),
            "{advice}"
        );
        caller.root_has_files = true;
        assert_eq!(caller.advice(), None);
    }
}

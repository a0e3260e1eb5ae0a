//! Removes models of the registry and bases of the cache.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use homeroom_engine::files::{bytes_below, is_named, recover, take_away};

use super::entries::is_there;
use super::lineage::{Target, Users, users_of};
use super::names::brief;
use super::{Entry, bases, is_name, place};
use crate::hub::{HubName, cache};
use crate::near::{LIST_HINT, did_you_mean, named_model};
use crate::progress::line;

/// What is to be removed, and what that does.
pub struct Removal {
    /// As the user named it.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub target: Target,
    /// Bytes that are freed.
    pub bytes: u64,
    /// Whether it is a link, so that what it leads to stays.
    pub is_link: bool,
    /// Who names it, apart from what is removed together with it.
    pub users: Users,
}

/// Looks at what is to be removed; nothing is touched.
///
/// # Errors
/// When the name is none, or nothing has it that may be removed.
pub fn removal(name: &str, all: &[Entry]) -> Result<Removal> {
    if !is_name(name) {
        return of_base(name, all);
    }
    let path = place(name)?;
    recover(&path);
    ensure!(is_there(&path)?, "{name}: no such model{}{LIST_HINT}", did_you_mean(named_model(name.as_ref())));
    let is_link = path.is_symlink();
    let target = Target::Model(name.to_owned());
    let users = users_of(&target, all, &mut |text| line(format_args!("note: {text}")));
    Ok(Removal { name: name.to_owned(), bytes: bytes_below(&path), path, target, is_link, users })
}

fn of_base(name: &str, all: &[Entry]) -> Result<Removal> {
    let Some(hub_name) = HubName::parse(name) else {
        let near = did_you_mean(named_model(name.as_ref()));
        bail!(
            "`{}` is no name of a model{near}: a model of yours has up to 64 small letters, digits, dots, dashes and underscores, and a base is `owner/name`\nhint: only what `homeroom list-models` shows is removed here; remove other files yourself",
            brief(name)
        );
    };
    ensure!(
        hub_name.revision.is_none() && hub_name.quantization.is_none(),
        "{name}: a base is removed with all that there is of it\nhint: `homeroom rm {}`",
        hub_name.repo
    );
    let (own, shared): (Vec<_>, Vec<_>) =
        bases()?.into_iter().filter(|base| base.name == hub_name.repo).partition(|base| !base.shared);
    let Some(base) = own.into_iter().next() else {
        if let Some(base) = shared.first() {
            bail!(
                "{name}: it lies in a store that is shared, which is only read: {}\nhint: whoever keeps that store removes it there",
                base.path.display()
            );
        }
        bail!("{name}: no such base in the cache{}{LIST_HINT}", did_you_mean(named_model(name.as_ref())));
    };
    let is_shared = shared.iter().any(|base| !base.forms.is_empty());
    let target = Target::Base { repo: base.name, folder: base.path.clone(), is_shared };
    let users = users_of(&target, all, &mut |text| line(format_args!("note: {text}")));
    Ok(Removal {
        name: name.to_owned(),
        // What a link leads to stays, as where `blobs` is one.
        bytes: bytes_below(&base.path),
        is_link: base.path.is_symlink(),
        path: base.path,
        target,
        users,
    })
}

impl Removal {
    /// Removes it: whoever is killed meanwhile leaves a model whole or gone, and of a base nothing that is taken for a whole one.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn carry_out(&self) -> Result<()> {
        if let Target::Base { repo, .. } = &self.target {
            return cache::remove(repo).map(drop);
        }
        recover(&self.path);
        // Another process may have been faster.
        ensure!(is_named(&self.path)?, "{}: another process has removed it", self.name);
        take_away(&self.path)
    }
}

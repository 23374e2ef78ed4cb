//! The names of users and groups in the host's own files.
//!
//! Databases on the network are not asked, because such a call can block for as long as its server
//! does. A name that is not in the files is `None`.

use std::fs;

/// Returns the name of a user.
pub(crate) fn user_name(user: u32) -> Option<String> {
    name_in(&fs::read_to_string("/etc/passwd").ok()?, user)
}

/// Returns the name of a group.
pub(crate) fn group_name(group: u32) -> Option<String> {
    name_in(&fs::read_to_string("/etc/group").ok()?, group)
}

/// Returns true if the host has a group of this name.
pub(crate) fn has_group(name: &str) -> bool {
    let known = fs::read_to_string("/etc/group").unwrap_or_default();
    known.lines().any(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(':')))
}

/// Finds a number in `/etc/passwd` or `/etc/group`, whose lines begin with `NAME:PASSWORD:NUMBER`.
fn name_in(known: &str, number: u32) -> Option<String> {
    known.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(number)).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_number_has_the_name_of_its_own_line() {
        let known = "root:x:0:0:root:/root:/bin/sh\n# 7:x:7\n\nkvm:x:7:ann,bob\n";
        assert_eq!(name_in(known, 0).as_deref(), Some("root"));
        assert_eq!(name_in(known, 8), None);
        assert_eq!(name_in("kvm:x:7:ann\n", 7).as_deref(), Some("kvm"));
        assert!(has_group("root") && !has_group("roo") && !has_group("no-such-group"));
    }
}

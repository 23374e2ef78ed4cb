//! The tables, and the upgrade of an older database.
//!
//! `vms` holds the VMs that exist, `events` the history of all VMs, `meta` facts about this state
//! directory. A value that a query asks for is a column. The rest is JSON, and the column `format`
//! numbers its version, because a new field of a record then needs no migration. The version of the
//! schema is SQLite's `user_version`. A released step of [`MIGRATIONS`] is never changed: a change
//! is one more step. A database of a later version is refused, because steps go forward only.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};
use vmm_core::backend::Effect;
use vmm_core::store::{StoreError, StoreErrorKind};

use crate::error::{from_sqlite, store_error};

/// The number that marks a database as this program's: "VMCP" in ASCII.
pub(crate) const APPLICATION_ID: i32 = i32::from_be_bytes(*b"VMCP");

/// One step of an upgrade.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Migration {
    /// The version that the step leads to. The steps are in ascending order.
    pub(crate) to: i32,
    /// A description of the change for the log.
    pub(crate) what: &'static str,
    /// The statements of the step.
    pub(crate) sql: &'static str,
}

/// Every step since the first release.
pub(crate) const MIGRATIONS: &[Migration] =
    &[Migration { to: 1, what: "the first tables", sql: include_str!("schema/v1.sql") }];

/// Refuses a database of a version that `migrations` do not know. Reads only.
pub(crate) fn refuse_newer(
    conn: &Connection,
    path: &Path,
    migrations: &[Migration],
) -> Result<(), StoreError> {
    let found = version(conn, path)?;
    let known = migrations.last().map_or(0, |step| step.to);
    if (0..=known).contains(&found) {
        return Ok(());
    }
    Err(store_error(
        StoreErrorKind::Newer,
        Effect::NotApplied,
        format!(
            "the database {} has version {found} of the schema, and this program knows versions up to {known}: a newer \
             program wrote it. Nothing was changed. Start that program again, or put back the backup from before the \
             upgrade",
            path.display()
        ),
    ))
}

/// Upgrades the database to the last of `migrations`, each step in a transaction of its own.
pub(crate) fn migrate(
    conn: &mut Connection,
    path: &Path,
    migrations: &[Migration],
) -> Result<(), StoreError> {
    refuse_newer(conn, path, migrations)?;
    let found = version(conn, path)?;
    for step in migrations.iter().filter(|step| step.to > found) {
        apply_step(conn, step).map_err(|error| from_sqlite(path, "upgrading", Effect::NotApplied, error))?;
        tracing::info!(version = step.to, step = step.what, "the schema of the database was upgraded");
    }
    Ok(())
}

fn apply_step(conn: &mut Connection, step: &Migration) -> rusqlite::Result<()> {
    let transaction = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(step.sql)?;
    // The version changes in the transaction of the step, because a step that fails must leave both
    // as they were.
    transaction.pragma_update(None, "user_version", step.to)?;
    transaction.commit()
}

/// Returns the version of the database's schema.
pub(crate) fn version(conn: &Connection, path: &Path) -> Result<i32, StoreError> {
    conn.pragma_query_value(None, "user_version", |row| row.get(0))
        .map_err(|error| from_sqlite(path, "reading", Effect::NotApplied, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "test.db";
    const STEPS: &[Migration] = &[
        Migration {
            to: 1,
            what: "one",
            sql: "CREATE TABLE a (x TEXT) STRICT; INSERT INTO a VALUES ('kept');",
        },
        Migration { to: 2, what: "two", sql: "ALTER TABLE a ADD COLUMN y INTEGER NOT NULL DEFAULT 7;" },
        Migration { to: 5, what: "three", sql: "CREATE INDEX a_y ON a (y); UPDATE a SET y = y + 1;" },
    ];

    fn memory() -> Connection {
        Connection::open_in_memory().unwrap()
    }

    #[test]
    fn every_schema_version_is_upgraded_with_its_rows() {
        for already in 0..=STEPS.len() {
            let mut conn = memory();
            migrate(&mut conn, Path::new(PATH), &STEPS[..already]).unwrap();
            migrate(&mut conn, Path::new(PATH), STEPS).unwrap();
            migrate(&mut conn, Path::new(PATH), STEPS).unwrap();
            let row: (String, i64) =
                conn.query_row("SELECT x, y FROM a", [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
            assert_eq!(row, ("kept".to_owned(), 8), "from {already} steps");
            assert_eq!(version(&conn, Path::new(PATH)).unwrap(), 5);
        }
    }

    #[test]
    fn a_failed_upgrade_keeps_the_previous_version() {
        let broken = [
            STEPS[0],
            Migration { to: 2, what: "broken", sql: "UPDATE a SET x = 'lost'; SELECT * FROM nowhere;" },
        ];
        let mut conn = memory();
        migrate(&mut conn, Path::new(PATH), &broken).unwrap_err();
        assert_eq!(version(&conn, Path::new(PATH)).unwrap(), 1);
        let x: String = conn.query_row("SELECT x FROM a", [], |row| row.get(0)).unwrap();
        assert_eq!(x, "kept");
        migrate(&mut conn, Path::new(PATH), STEPS).unwrap();
    }

    #[test]
    fn a_newer_schema_version_is_refused_without_a_change() {
        let mut conn = memory();
        migrate(&mut conn, Path::new(PATH), STEPS).unwrap();
        let error = migrate(&mut conn, Path::new(PATH), &STEPS[..2]).unwrap_err();
        assert_eq!(error.kind, StoreErrorKind::Newer);
        assert!(error.message.contains("version 5"), "{error}");
        assert_eq!(version(&conn, Path::new(PATH)).unwrap(), 5);
    }

    #[test]
    fn the_upgrade_steps_are_in_order() {
        assert!(MIGRATIONS.windows(2).all(|pair| pair[0].to < pair[1].to));
        migrate(&mut memory(), Path::new(PATH), MIGRATIONS).unwrap();
    }
}

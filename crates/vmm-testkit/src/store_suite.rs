//! The suite that every [`Store`] must pass.
//!
//! A case gets a [`StoreFixture`], which keeps the data of a store so that the store can be opened
//! again. Put `vmm_testkit::store_suite!(make_place);` into a test file, where `make_place` is a
//! function that makes an empty fixture. Each case becomes a test there (which needs `tokio` with
//! `macros` and `rt-multi-thread`).

mod answers;
mod events;
mod records;
mod samples;

use std::future::Future;
use std::sync::Arc;

use vmm_core::store::Store;

pub use answers::*;
pub use events::*;
pub use records::*;
pub use samples::{all_events, event, insert, kept, keyed_call, next, record, remove, update};

/// The data of a store, which outlives the store object.
pub trait StoreFixture: Send + Sync {
    /// Opens the store of this fixture, with the data that the previous one left.
    fn open(&self) -> impl Future<Output = Arc<dyn Store>> + Send;
}

/// Makes a test of each case of the suite, each with a fixture made by the function `$make`.
#[macro_export]
macro_rules! store_suite {
    ($make:path) => {
        $crate::store_suite!(@each $make:
            all_data_survives_a_reopening
            a_read_reflects_every_answered_commit
            a_name_belongs_to_one_living_vm
            one_of_many_inserts_of_a_name_succeeds
            an_update_needs_the_previous_generation
            one_of_many_updates_of_a_generation_succeeds
            a_second_removal_is_harmless_and_keeps_the_events
            a_tombstone_stays_until_its_removal
            events_have_no_gaps_and_follow_the_order_of_the_answers
            events_are_paged
            expiry_removes_old_events_and_no_position_is_reused
            expiry_makes_no_gap_after_the_clock_was_set_back
            a_cancelled_commit_is_complete_or_absent
            a_forced_commit_obeys_the_rules_of_a_plain_one
            an_answer_is_kept_with_its_commit_across_openings
            an_answer_of_a_refused_commit_is_not_kept
            an_answer_is_replaced_and_forgotten
            expired_answers_are_removed
        );
    };
    (@each $make:path: $($case:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                $crate::store_suite::$case(&$make()).await;
            }
        )*
    };
}

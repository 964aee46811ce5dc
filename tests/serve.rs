//! `fspfs serve`, driven by software that others wrote: boto3, its checks of what it is answered
//! included, and the AWS CLI. What they ask and expect is in `tests/serve/*.py`.
#![allow(clippy::unwrap_used)]

#[path = "serve/interplay.rs"]
mod interplay;
#[path = "serve/limits.rs"]
mod limits;
mod support;

use support::Sandbox;
use support::serve::{Server, has_clients};

/// A test for each of these functions of a script, which has an empty repository to itself.
macro_rules! scripts {
    ($file:literal: $($function:ident)*) => {$(
        #[test]
        fn $function() {
            if !super::has_clients() {
                return;
            }
            let sandbox = super::Sandbox::with_store();
            let server = super::Server::new(&sandbox, &[]);
            server.script($file, &[stringify!($function)]);
            server.stop();
        }
    )*};
}

/// The operations of the EBS direct APIs.
mod direct {
    scripts! { "direct.py":
        a_start_answers_what_it_was_told
        a_client_token_is_for_one_request
        a_start_is_refused_for_what_is_wrong_with_it
        encryption_is_said_and_inherited
        a_put_is_checked
        a_block_may_be_put_again_until_the_snapshot_is_completed
        a_completion_counts_and_compares
        a_completion_is_refused_for_what_is_wrong_with_it
        eight_writers_of_one_snapshot
        what_proxies_read_otherwise_is_refused
    }
    scripts! { "reading.py":
        pages_of_blocks
        page_tokens_are_for_one_listing
        differences_of_a_lineage
        differences_are_paged
        unrelated_snapshots_have_no_differences
        a_block_is_read_with_its_token
        a_token_is_for_one_snapshot_of_an_id
        what_is_not_there_or_not_complete_is_not_read
    }
}

/// The actions of EC2 and STS.
mod query {
    scripts! { "query.py":
        snapshots_are_described
        snapshots_are_filtered
        snapshots_are_paged
        tags_are_made_and_taken_away
        tags_are_described
        there_are_fifty_tags_at_most
        snapshots_are_deleted
        any_text_is_described
        where_and_who_one_is
        what_is_no_action_is_refused
    }
}

/// Who may ask.
mod access {
    scripts! { "access.py":
        wrong_keys_are_refused
        a_request_without_a_signature_is_refused
        a_clock_may_be_five_minutes_off
        a_signature_is_for_one_request
        what_decides_has_to_be_signed
        only_a_block_may_be_unsigned
    }
}

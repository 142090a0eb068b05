//! The refusals of the core: each once, with its code and its wording.
//!
//! What a limit of memory refuses is worded in [`crate::ledger`], and what a checker of another
//! crate refuses in that crate.

use std::fmt::Display;

use latzero_protocol::{Code, Refusal};

/// The text of a refusal.
macro_rules! text {
    ($text:literal) => {
        $text
    };
    ($text:literal $($part:ident)+) => {
        format!($text)
    };
}

/// Defines one function per refusal, from its code, its name, the parts of its text, and its text.
macro_rules! refusals {
    ($($code:ident $name:ident($($part:ident),*) $text:literal)*) => {$(
        pub(crate) fn $name($($part: impl Display),*) -> Refusal {
            Refusal::new(Code::$code, text!($text $($part)*))
        }
    )*};
}

// Handshakes and the state of the server.
refusals! {
    NotReady not_ready()
        "the first message must be a handshake: {\"action\":\"handshake\",\"app_id\":\"…\"}"
    AlreadyReady already_ready()
        "this connection has completed its handshake; open another one for another app"
    UnsupportedProtocol unsupported_protocol(asked, own)
        "protocol {asked} is not supported; this server supports {own}"
    Draining draining_handshakes() "the server is shutting down; reconnect later"
    Draining draining_calls() "the server is shutting down and accepts no new calls"
    AppInUse app_is_exclusive(app)
        "app '{app}' already has a connected instance, and one of the two is exclusive; stop the \
         other one, or send \"takeover\":true"
    AlreadyReady too_late_to_prove()
        "an app is proved before the handshake; open another connection"
    FrameTooLarge proof_too_large(max) "a proof before the handshake has at most {max} bytes"
    BadMessage not_binary(field, bytes)
        "field '{field}' must be {bytes} bytes in base64url without padding"
    Forbidden no_admin_over_plain_tcp()
        "nobody administers over plain TCP; use the Unix socket or TLS (admin_over_plain_tcp)"
    Quota too_many_instances(app, max)
        "app '{app}' has {max} instances (limits.instances_per_app_max)"
    Quota too_many_apps(count) "{count} apps are connected (limits.apps_max)"
    Quota too_many_served(triggers, pools, served, max)
        "{triggers} triggers in {pools} pools make {served} handlers, but an app may have only \
         {max} (limits.served_per_app_max); name the pools of each trigger"
    TooLarge field_too_large(field, bytes, max)
        "field '{field}' has {bytes} bytes; the maximum is {max} (limits.meta_bytes_max)"
}

// Apps and their names.
refusals! {
    NoApp no_app(app) "there is no app '{app}'"
    NoApp no_key(app) "app '{app}' has no key"
    AppInUse app_is_connected(app)
        "app '{app}' is connected; stop it first, or use `latzero kick {app}`"
    Offline app_is_offline(app) "app '{app}' is known, but not connected"
    Offline no_instance(app, pool) "app '{app}' has no such instance in pool '{pool}'"
    NotMember app_not_in_pool(app, pool) "app '{app}' is not in pool '{pool}'"
    Unauthenticated key_not_proved(app) "app '{app}' has a key, which must be proved first"
    Unauthenticated name_of_other_user(app)
        "AppID '{app}' belongs to another user; connect over the Unix socket as that user, or \
         choose another AppID"
    Forbidden name_of_server(app) "AppID '{app}' is the server's own; choose another"
    Forbidden name_of_tool(app, uid)
        "AppID '{app}' is only for user {uid} on the Unix socket; choose another"
    Forbidden name_not_certified(app, names)
        "your TLS certificate is for {names}, not for AppID '{app}'; use a certificate that names \
         it as latzero://{app}"
    Quota too_many_keys(max) "{max} AppIDs have keys (limits.app_keys_max)"
    Forbidden not_admin()
        "only an administrator may do this: the server's user over the Unix socket, or anyone who \
         proves the admin token"
    Forbidden not_servers_user() "only the server's user may do this, over the Unix socket"
    BadMessage cannot_hand_over()
        "a hand-over needs the Unix socket, with the features 'attachments' and 'fd_passing'"
}

// Pools and membership.
refusals! {
    NotMember not_member(pool)
        "this app is not in pool '{pool}'; name it in the handshake or send pool_join"
    NotMember nothing_to_leave(pool) "this app is not in pool '{pool}'"
    NotMember pool_was_removed(pool) "pool '{pool}' was removed; join it again with pool_join"
    NoPool no_pool(pool) "there is no pool '{pool}'"
    NoPool pool_just_removed(pool) "pool '{pool}' was just removed"
    PoolExists pool_exists(pool) "pool '{pool}' exists; join it, or choose another name"
    Quota too_many_pools(count) "there are {count} pools (limits.pools_max)"
    // Reveals nothing else.
    Forbidden pool_not_open(app, pool) "pool '{pool}' is not open to app '{app}'"
    Forbidden pool_is_built_in(pool) "pool '{pool}' is built in and cannot be removed"
    Forbidden pool_of_other(pool, owner)
        "pool '{pool}' is owned by {owner}; only the owner may remove it"
    Forbidden pool_has_members(pool, count)
        "pool '{pool}' has {count} members; add \"force\":true to remove it anyway"
    Forbidden removal_needs_write(pool) "removing pool '{pool}' needs the role 'write' in it"
    Forbidden role_not_proved(role, pool)
        "this needs the role '{role}' in pool '{pool}'; prove it with the keys that have it"
    Forbidden trigger_is_privileged(trigger, pool)
        "trigger '{trigger}' of pool '{pool}' is privileged: only members that may write can \
         call it or emit to it"
    BadMessage privileged_in_plain_pool(trigger, pool)
        "trigger '{trigger}' is privileged, and pool '{pool}' is not encrypted; serve it only \
         in encrypted pools"
    Forbidden triggers_in_system_pool(trigger, pool)
        "trigger '{trigger}' cannot be served in pool '{pool}', which belongs to the server"
    Forbidden right_is_denied(right, pool)
        "the policy of pool '{pool}' does not give this app the right '{right}'"
    Storage policy_is_invalid(pool) "the policy of pool '{pool}' is invalid"
    Storage descriptor_is_damaged(pool) "the stored descriptor of pool '{pool}' is invalid"
    BadMessage pool_id_in_use()
        "the pool id of the descriptor is in use here; make a new descriptor"
    BadMessage memory_does_not_fit() "field 'memory' does not fit the suite of the descriptor"
    BadMessage descriptor_not_signed() "the descriptor is not signed by the owner that it names"
    BadMessage block_not_signed()
        "the block does not verify: its manifest is not signed by a writer"
    BadMessage not_a_descriptor()
        "field 'descriptor' is not a descriptor in base64url without padding"
    BadMessage payload_not_sealed(pool) "payloads in pool '{pool}' are sealed envelopes"
    BadMessage would_outlive(what, pool)
        "{what} would outlive the policy of pool '{pool}': create the pool with \"durable\":true"
}

// Calls on their way to a handler.
refusals! {
    BadMessage id_in_use(id)
        "id '{id}' is in use by another call of this app, in flight or parked, or by an answer \
         that the app has not fetched"
    NoHandler no_handler(trigger, pool) "no app serves trigger '{trigger}' in pool '{pool}'"
    NoHandler not_served_by(app, trigger, pool)
        "app '{app}' does not serve trigger '{trigger}' in pool '{pool}'"
    Overloaded handlers_are_busy(trigger, pool)
        "every handler of trigger '{trigger}' in pool '{pool}' is at its concurrency or has a full \
         outbox; try again later, or add handlers"
    Overloaded handler_is_silent(max, trigger)
        "{max} of your calls wait for a handler of trigger '{trigger}' \
         (limits.in_flight_per_handler_max)"
    Overloaded too_many_in_pool(pool, count, whose, max)
        "pool '{pool}' has {count} calls {whose} in flight (limits.pending_max is {max}); try \
         again later"
    Overloaded too_many_in_flight(max)
        "{max} calls of this connection are in flight (limits.in_flight_max)"
    TooLarge call_too_large_as_base64()
        "the payload is too large as base64 for a handler without the feature 'attachments'"
    BadMessage durable_call_with_blocks()
        "a call with \"park\" or \"redeliver\" cannot name blocks"
    BadMessage parked_for_instance()
        "a parked call waits for an app, not for an instance, because instances do not come back"
    BadMessage parked_with_window() "a parked call has only one answer: remove 'window'"
    Storage stored_call_is_invalid() "the stored call is invalid"
    Timeout expired_before_its_turn()
        "the call's ttl ended while it waited for other calls of its connection"
}

// The ends of calls.
refusals! {
    Cancelled call_cancelled() "the call was cancelled"
    Cancelled caller_left() "the caller is no longer in the call's pool"
    HandlerGone handler_gone()
        "the handler disconnected before it answered; repeat the call if it is safe to run twice"
    HandlerGone no_other_handler(cause) "{cause}, and no other handler took the call"
    HandlerGone pool_removed() "the pool was removed"
    NoPool pool_removed_while_parked() "the pool was removed or got new keys while the call waited"
    Timeout no_answer_in_time(ms) "no answer within the call's ttl of {ms} ms"
    Timeout never_taken() "no handler took the call within its ttl"
    Timeout no_answer() "no answer within the call's ttl"
    Timeout no_answer_after(attempt, cause)
        "no answer within the call's ttl; attempt {attempt} failed: {cause}"
    AttemptsExhausted attempts_exhausted(times, cause) "{times} failed; the last: {cause}"
    HandlerError window_exceeded() "the handler sent more items than the stream's window allows"
    TooLarge answer_too_large_as_base64()
        "the raw bytes of the answer are too large for a caller without the feature 'attachments'"
    HandlerGone answer_not_kept(why) "the answer could not be kept: {why}"
    Forbidden call_of_other_handler()
        "this call was sent to another instance; only that one may answer it"
    NoCall no_parked_call(number) "there is no parked call {number} that you may see"
    BadMessage parked_call_has_ended(number)
        "parked call {number} has ended: there is nothing to cancel"
    BadMessage parked_call_not_dead(number)
        "parked call {number} is not dead: only dead calls can be run again"
    BadMessage parked_call_not_ended(number)
        "parked call {number} has not ended: cancel it instead"
}

// Repeats of calls.
refusals! {
    Overloaded too_many_keyed_calls(max)
        "{max} calls with an idempotency key are in progress (limits.repeats_max)"
    Overloaded too_many_repeats(max)
        "{max} repeats of calls wait for their answers (limits.repeats_max)"
    Overloaded too_many_repeats_of_call(max) "{max} repeats of this call wait for its answer"
    Overloaded answer_did_not_fit()
        "the answer did not fit in the connection's outbox (limits.outbox_bytes_max): read faster"
    HandlerGone repeats_answer_did_not_fit()
        "the answer did not fit in the connection's outbox (limits.outbox_bytes_max): read \
         faster, and repeat the call"
    HandlerGone original_not_answered()
        "the original call ended without an answer; repeat it if it is safe to run twice"
    Cancelled repeat_cancelled() "the caller cancelled the repeat; the original call goes on"
    Timeout repeat_expired() "no answer within the repeat's ttl; the original call goes on"
}

// Blocks of memory.
refusals! {
    NoBlock no_block(block, pool)
        "there is no block '{block}' in pool '{pool}'; memory_list lists the blocks"
    Quota block_left_out(block, pool, why)
        "block '{block}' of pool '{pool}' was not loaded when the server started, because of a \
         limit: {why}; restart the server with a higher limit"
    Forbidden block_forbidden(app, access, block, pool, owner)
        "app '{app}' may not {access} block '{block}' of pool '{pool}'; its owner is '{owner}'"
    Forbidden block_name_is_kept(block, pool)
        "the name of block '{block}' in pool '{pool}' is kept for its owner, who had it before the \
         server's start"
    Forbidden blocks_in_system_pool()
        "pool 'system' belongs to the server; create blocks in another pool"
    BlockExists block_exists(block, pool)
        "block '{block}' exists in pool '{pool}'; attach it, or create it with \
         \"if_exists\":\"attach\""
    BlockExists block_is_smaller(block, size, asked)
        "block '{block}' exists with {size} bytes, fewer than the {asked} requested; resize it"
    BlockExists block_occurs_twice(block, pool) "block '{block}' occurs twice in pool '{pool}'"
    BlockExists block_uid_in_use()
        "another block has this 'block_uid'; draw a new one for each block"
    BadMessage block_ends_at_once()
        "a block with \"lifetime\":\"attached\" would be removed at once; attach it when creating \
         it"
    BadMessage block_has_no_file(block)
        "block '{block}' is in memory; only persistent blocks can be flushed"
    TooLarge block_too_large(max, asked)
        "a block may have at most {max} bytes (limits.block_bytes_max); {asked} were requested"
    Quota no_room_for_block(needed, free, max, pool)
        "this needs {needed} bytes, but only {free} of {max} are free for blocks of pool '{pool}' \
         (limits.memory_bytes_per_pool_max); remove blocks that are no longer needed, or raise the \
         limit"
    TooLarge too_large_to_seal(bytes) "{bytes} bytes are too many to be sealed"
    LayoutMismatch other_layout(block, has, wanted) "block '{block}' has layout {has}, not {wanted}"
    LayoutMismatch layout_needs_more(needed, size)
        "the block's layout needs {needed} bytes, more than {size}"
    Storage block_record_is_invalid() "the record of a block is invalid"
    Storage no_generation_needed() "no new generation was needed after all"
    Overloaded too_many_wait_for_block(max, block)
        "{max} requests are already waiting for block '{block}' (limits.block_waiters_max)"
    Overloaded too_many_hold_lock(max, block)
        "{max} instances already hold the lock of block '{block}' (limits.block_waiters_max)"
    Overloaded too_many_descriptors(max)
        "{max} descriptors wait for you to read them (limits.descriptors_unread_max)"
    Locked block_locked(block, holder)
        "block '{block}' is locked by app '{holder}'; wait for its lock with \"wait\""
    Locked block_is_busy(block) "block '{block}' is being written or moved; try again"
    Locked block_is_busy_now(block) "block '{block}' is being written or moved; wait for its lock"
    Locked block_is_moving(block) "block '{block}' is moving to a new generation; try again"
    LockLost lock_lost(fence, block) "you do not hold lock '{fence}' of block '{block}'"
    Cancelled lock_wait_cancelled() "the wait for the lock was cancelled"
    Cancelled lender_call_ended()
        "the call that lent you the block has ended, so the wait for its lock has too"
    Cancelled left_while_waiting() "you left the pool while you waited"
    Overloaded data_did_not_fit()
        "the data did not fit in the connection's outbox (limits.outbox_bytes_max): read faster"
    TooLarge too_large_to_read(length, max)
        "{length} bytes do not fit in one reply; read at most {max} at a time, with \
         \"if_version\" to get parts of the same version"
    OutOfRange outside_block(asked, offset, block, size)
        "{asked} from offset {offset} is outside block '{block}', which has {size} bytes"
    VersionConflict other_version(block, version) "block '{block}' has version {version}"
}

// Blocks of encrypted pools.
refusals! {
    BadMessage gated_block_is_persistent()
        "a pool whose memory is gated has no persistent blocks: their bytes are plain"
    BadMessage sealed_block_is_raw()
        "a sealed block has snapshots; \"consistency\":\"raw\" has none"
    BadMessage sealed_block_changed_by_server()
        "only clients change the content of a sealed block: take its lock, and write a whole \
         version"
    BadMessage sealed_block_written_in_part()
        "a sealed block is written as a whole slot, at offset 0 and under its 'lock'"
    BadMessage block_uid_missing()
        "a block in a sealed pool needs a 'block_uid': 16 random bytes in base64url"
    BadMessage block_uid_unexpected() "field 'block_uid' is for blocks in sealed pools"
}

//! Blocks of an earlier run: files on disk, and memory that clients kept.

use super::*;

/// Restores the blocks of an earlier run: persistent ones from their files; clients may offer
/// shared ones. After a power loss, the checksums decide which content of a file is valid.
pub(crate) fn adopt_all(host: &mut IoHost, rows: Vec<BlockRow>, is_same_boot: bool) {
    let shared = Arc::clone(&host.shared);
    shared.storage.blocks.with_numbers(|numbers| {
        for row in &rows {
            let name = (PoolName::new(&row.pool), BlockId::new(&row.block_id));
            if let (Ok(pool), Ok(block)) = name {
                numbers.forget_process(&pool, &block, row.generation);
            }
        }
    });
    let mut missing: HashMap<(String, String), BlockRow> = shared
        .storage
        .blocks
        .rows
        .expect_blocks(rows)
        .into_iter()
        .map(|row| ((row.pool.clone(), row.block_id.clone()), row))
        .collect();
    let losses = Arc::clone(shared.storage.persistence.losses());
    let records = missing.values().filter_map(|row| {
        let file = row.file.clone()?;
        Some((file, rows::record(row)))
    });
    let records: HashMap<String, String> = records.collect();
    let remedy = "restore the block from a backup with `latzero restore`; the server never \
    deletes files that it moved aside";
    let mut lost = |affected: String, happened: String| {
        losses.note(Loss::new(Part::Memory, affected, happened, remedy));
    };
    let (kept, removed) = shared.storage.blocks.files.scan_with(&records, &mut lost);
    for mut kept in kept {
        let mut may_have_writer = false;
        if let Ok(custodian) = &kept.open {
            match resume(custodian, shared.storage.blocks.rows.boot(), is_same_boot) {
                Ok(is_same_boot) => may_have_writer = is_same_boot,
                Err(error) => kept.open = Err(error.to_string()),
            }
        }
        let (names, record) = (&kept.names, &kept.record);
        match adopt(host, kept.open, names, record, may_have_writer) {
            Ok((pool, block)) => {
                let losses = shared.storage.persistence.losses();
                losses.settle(Part::Memory, &room_for(&pool, &block));
                missing.remove(&(pool.as_str().into(), block.as_str().into()));
            }
            // With a higher limit it is restored completely.
            Err(refusal) if is_limit(&refusal) => {
                let name = Found { record, fence: 0 }.name();
                let affected = match &name {
                    Ok((pool, block)) => {
                        missing.remove(&(pool.as_str().into(), block.as_str().into()));
                        room_for(pool, block)
                    }
                    Err(_) => format!("memory/{names}"),
                };
                let happened =
                    format!("it was not loaded, because of a limit: {}", refusal.message);
                let remedy = "raise the limit and restart the server; the block's file and name \
                    are kept until then";
                let losses = shared.storage.persistence.losses();
                losses.note(Loss::new(Part::Memory, affected, happened, remedy));
            }
            Err(refusal) => {
                let affected = match (Found { record, fence: 0 }).name() {
                    Ok((pool, block)) => {
                        missing.remove(&(pool.as_str().into(), block.as_str().into()));
                        shared.storage.blocks.rows.forget(&pool, &block);
                        format!("block '{block}' of pool '{pool}'")
                    }
                    Err(_) => format!("memory/{names}"),
                };
                let happened = format!(
                    "it is unusable ({}); its file {names} was moved to memory/.orphans",
                    refusal.message
                );
                lost(affected, happened);
                shared.storage.blocks.files.set_aside(names);
            }
        }
    }
    for row in missing.into_values() {
        let left = Found {
            record: &rows::record(&row),
            fence: 0,
        };
        // Unless the last run removed it, and ended before its row was deleted.
        if !row.file.as_ref().is_some_and(|file| removed.contains(file)) {
            let affected = format!("block '{}' of pool '{}'", row.block_id, row.pool);
            lost(affected, "its file is missing, so the block is lost".into());
        }
        if let Ok((pool, block)) = left.name() {
            shared.storage.blocks.rows.forget(&pool, &block);
        }
    }
    // As at the end of a block: its mark goes after its row.
    let store = shared.storage.persistence.store();
    if !removed.is_empty() && store.commit(Vec::new()).is_ok() {
        removed
            .iter()
            .for_each(|id| shared.storage.blocks.files.forget(id));
    }
    shared.storage.persistence.store_losses();
    let (files, bytes) = shared.storage.blocks.files.orphans();
    if files > 0 {
        tracing::warn!(
            files,
            bytes,
            "memory/.orphans has files of persistent blocks that were moved there now or \
             earlier; the server never deletes them"
        );
    }
}

/// Makes a file's content safe to use. After a reboot the checksums decide, otherwise the header.
/// Returns whether the machine has not rebooted. `is_same_boot` is used for files that do not
/// record the boot.
fn resume(
    custodian: &Custodian,
    boot: Option<u64>,
    is_same_boot: bool,
) -> Result<bool, latzero_shm::Fault> {
    let is_same_boot = match (custodian.boot()?, boot) {
        (_, None) => false,
        (0, Some(_)) => is_same_boot,
        (noted, Some(boot)) => noted == boot,
    };
    if is_same_boot {
        custodian.forget_flush()?;
    } else {
        let version = custodian.recover()?;
        let description = custodian.description();
        tracing::debug!(
            version,
            generation = description.generation,
            "recovered a block after a reboot"
        );
    }
    // Only now, so that after an interrupted start the next one recovers again.
    custodian.set_boot(boot.unwrap_or(0))?;
    Ok(is_same_boot)
}

fn adopt(
    host: &mut IoHost,
    open: Result<Custodian, String>,
    names: &Names,
    record: &str,
    may_have_writer: bool,
) -> Result<(PoolName, BlockId), Refusal> {
    let custodian = open.map_err(|error| Refusal::new(Code::Storage, error))?;
    let (pool_name, block) = Found { record, fence: 0 }.name()?;
    let unix_ms = host.now.unix_ms;
    let (number, pool) =
        host.with_registry(|registry, _| registry.pool_for_kept(unix_ms, &pool_name))?;
    let name = (pool_name.clone(), block.clone());
    let taken = take(
        host,
        &pool,
        custodian,
        name,
        record,
        Some(names.clone()),
        may_have_writer,
    );
    if let Err(refusal) = &taken
        && is_limit(refusal)
    {
        let why = refusal.message.as_ref();
        host.with_pool(&pool, |pool, fx| {
            pool.blocks().reserve_name(&block, why, fx)
        });
    }
    if taken.is_err() {
        // The pool is removed again if it was created only for this block.
        host.effects.held.push((pool_name.clone(), number, 0));
        host.with_pool(&pool, |_, _| ());
    }
    taken.map(|()| (pool_name, block))
}

/// Whether the error means that there is no room for a block, not that the block is invalid.
fn is_limit(refusal: &Refusal) -> bool {
    matches!(refusal.code, Code::Quota | Code::TooLarge)
}

/// What is missing if a limit excludes a block, in the form of losses.
fn room_for(pool: &PoolName, block: &BlockId) -> String {
    format!("room for block '{block}' of pool '{pool}'")
}

/// Restores a block of an earlier run in its pool.
fn take(
    host: &mut IoHost,
    pool: &Arc<PoolCell>,
    custodian: Custodian,
    (pool_name, block): (PoolName, BlockId),
    record: &str,
    names: Option<Names>,
    may_have_writer: bool,
) -> Result<(), Refusal> {
    let faulty = |error: latzero_shm::Fault| Refusal::new(Code::Storage, error.to_string());
    // The process that held the lock when the server died may still write, so fences continue above
    // all earlier ones. An invalid header must not use up the fences.
    let fence = custodian.lease().map_err(faulty)?.min(FENCE_KEPT_MAX) + 1;
    let version = custodian.version().map_err(faulty)?;
    // Nor may it write into a version that another writer begins: the block moves, and until then
    // its header says that it must.
    let has_writer = may_have_writer && custodian.is_lease_held().map_err(faulty)?;
    let found = Found { record, fence };
    let owner = found.owner()?;
    let account = host.with_registry(|registry, turn| registry.kept_account(&owner, turn));
    let storage = host.with_pool(pool, |pool, fx| pool.blocks().adopt(&found, &account, fx))?;
    let stored = StoredBlock::new(custodian, pool_name, block.clone(), version, names);
    if let Err(error) = stored.custodian.set_lease(fence, has_writer) {
        tracing::warn!(pool = %stored.pool, block = %stored.block, %error, "cannot reset the \
            lock of a block");
    }
    host.shared.storage.blocks.rows.note(&stored, record);
    host.shared.storage.blocks.insert(storage, stored);
    host.with_pool(pool, |pool, fx| {
        if has_writer {
            pool.blocks().abandon_writer(&block, fx);
        }
        pool.blocks().add_spares(&block, fx);
    });
    Ok(())
}

/// Accepts the memory that a client offers for a block of an earlier run.
///
/// # Errors
/// `forbidden` if it is not the memory of that block; and those of the pool.
pub(crate) fn reoffer(
    host: &mut IoHost,
    pool: &Arc<PoolCell>,
    (pool_name, block): (&PoolName, &BlockId),
    row: &BlockRow,
    offered: &OwnedFd,
) -> Result<(), Refusal> {
    let another = |why: String| {
        let message = format!(
            "the memory offered for block '{block}' is not the block's memory: \
            {why}"
        );
        Refusal::new(Code::Forbidden, message)
    };
    let custodian = Custodian::from_fd(offered).map_err(|error| another(error.to_string()))?;
    let identity = custodian
        .identity()
        .map_err(|error| another(error.to_string()))?;
    let description = custodian.description();
    let is_it = (Some(identity.0), Some(identity.1)) == (row.dev, row.ino)
        && description.generation == row.generation
        && (description.geometry.size, description.geometry.slots) == (row.size, row.slots);
    if !is_it {
        return Err(another("it belongs to another block or generation".into()));
    }
    // Its header says that it was removed: the server died before that was stored.
    if custodian.state().is_ok_and(|state| state != State::Live) {
        host.shared.storage.blocks.rows.forget(pool_name, block);
        let message = format!("block '{block}' of pool '{pool_name}' was removed");
        return Err(Refusal::new(Code::NoBlock, message));
    }
    let name = (pool_name.clone(), block.clone());
    take(host, pool, custodian, name, &rows::record(row), None, true)?;
    tracing::info!(pool = %pool_name, %block, "recovered a shared block from a client");
    Ok(())
}

/// Takes over the shared blocks of the previous server.
pub(crate) fn take_over(host: &mut IoHost, blocks: Vec<(PoolName, BlockId, OwnedFd)>) {
    for (pool_name, block, offered) in blocks {
        let unix_ms = host.now.unix_ms;
        let taken = host
            .with_registry(|registry, _| registry.pool_for_kept(unix_ms, &pool_name))
            .and_then(|(number, pool)| {
                let row = host.shared.storage.blocks.awaited_row(&pool_name, &block);
                let taken =
                    row.and_then(|row| reoffer(host, &pool, (&pool_name, &block), &row, &offered));
                if taken.is_err() {
                    host.effects.held.push((pool_name.clone(), number, 0));
                    host.with_pool(&pool, |_, _| ());
                }
                taken
            });
        if let Err(error) = taken {
            tracing::warn!(pool = %pool_name, %block, %error, "cannot take over a block");
        }
    }
}

/// Drops the blocks of an earlier run that nobody offered in time.
pub(crate) fn end_grace(shared: &ServerState, now: Time) {
    let gone = shared
        .storage
        .blocks
        .rows
        .end_grace(shared.books.started, now);
    if gone > 0 {
        tracing::info!(
            blocks = gone,
            "shared blocks of an earlier run were lost, because no client had them mapped"
        );
    }
}

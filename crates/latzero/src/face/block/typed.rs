//! A block as an array of numbers.

use std::marker::PhantomData;
use std::time::Duration;

use latzero_protocol::Code;
use latzero_shm::Element;

use super::Block;
use crate::error::Error;

/// A block as an array of numbers of type `T`.
#[derive(Debug, Clone)]
pub struct TypedBlock<T> {
    block: Block,
    shape: Vec<u64>,
    element: PhantomData<fn() -> T>,
}

impl<T: Element> TypedBlock<T> {
    pub(super) fn of(block: &Block) -> Result<TypedBlock<T>, Error> {
        let shape = match block.layout() {
            // Without a layout it has as many numbers as fit.
            None => vec![block.size() / T::BYTES as u64],
            Some(layout) => {
                let dtype = layout["dtype"].as_str().unwrap_or_default();
                if dtype != T::DTYPE {
                    let text =
                        format!("block '{}' holds '{dtype}', not '{}'", block.id(), T::DTYPE);
                    return Err(Error::new(Code::LayoutMismatch, text));
                }
                let shape = layout["shape"].as_array();
                shape
                    .into_iter()
                    .flatten()
                    .filter_map(serde_json::Value::as_u64)
                    .collect()
            }
        };
        Ok(TypedBlock {
            block: block.clone(),
            shape,
            element: PhantomData,
        })
    }

    /// The block.
    #[must_use]
    pub fn block(&self) -> &Block {
        &self.block
    }

    /// The length of each dimension.
    #[must_use]
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::try_from(self.shape.iter().product::<u64>()).unwrap_or(usize::MAX)
    }

    /// Whether it has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All numbers of the newest version, in row-major order, and the version.
    ///
    /// # Errors
    /// As [`Block::read`].
    pub async fn read(&self) -> Result<(Vec<T>, u64), Error> {
        let mut bytes = vec![0; self.len() * T::BYTES];
        let version = self.block.read_into(0, &mut bytes).await?;
        Ok((
            bytes.chunks_exact(T::BYTES).map(T::from_le).collect(),
            version,
        ))
    }

    /// The number at `index`, in row-major order.
    ///
    /// # Errors
    /// `out_of_range`, and as [`Block::read`].
    pub async fn load(&self, index: u64) -> Result<T, Error> {
        let mut bytes = vec![0; T::BYTES];
        self.block
            .read_into(self.offset(index)?, &mut bytes)
            .await?;
        Ok(T::from_le(&bytes))
    }

    /// Writes numbers from `index` on, in row-major order, as one version under the block's lock,
    /// for which it waits at most `wait`; returns the version.
    ///
    /// # Errors
    /// `out_of_range`, and as [`Block::write`].
    pub async fn write(&self, index: u64, numbers: &[T], wait: Duration) -> Result<u64, Error> {
        let mut bytes = vec![0; numbers.len() * T::BYTES];
        for (number, place) in numbers.iter().zip(bytes.chunks_exact_mut(T::BYTES)) {
            number.to_le(place);
        }
        let offset = self.offset(index)?;
        let mut draft = self.block.write(wait).await?;
        match draft.write(offset, &bytes) {
            Ok(()) => draft.commit().await,
            Err(error) => {
                draft.abandon();
                Err(error)
            }
        }
    }

    fn offset(&self, index: u64) -> Result<u64, Error> {
        index.checked_mul(T::BYTES as u64).ok_or_else(|| {
            let text = format!("block '{}' has no element {index}", self.block.id());
            Error::new(Code::OutOfRange, text)
        })
    }
}

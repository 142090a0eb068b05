//! A table with keys that can become stale: a slot that is freed and reused gets a new generation.

use std::fmt;
use std::marker::PhantomData;

/// The position of a value of type `T` in its [`Slab`].
pub struct Key<T> {
    /// The place.
    pub slot: u32,
    /// How often the place was used before.
    pub generation: u32,
    kind: PhantomData<fn() -> T>,
}

impl<T> Key<T> {
    pub(crate) const fn new(slot: u32, generation: u32) -> Self {
        Key {
            slot,
            generation,
            kind: PhantomData,
        }
    }
}

impl<T> Clone for Key<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Key<T> {}

impl<T> PartialEq for Key<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.slot, self.generation) == (other.slot, other.generation)
    }
}

impl<T> Eq for Key<T> {}

impl<T> PartialOrd for Key<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Key<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.slot, self.generation).cmp(&(other.slot, other.generation))
    }
}

impl<T> std::hash::Hash for Key<T> {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write_u64(u64::from(self.slot) << 32 | u64::from(self.generation));
    }
}

impl<T> fmt::Debug for Key<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.slot, self.generation)
    }
}

struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

/// Values in slots, which are found by key in constant time and iterated in the order of the slots.
/// The keys of a table have the type `K`: the type of the values, or a marker if that is generic.
pub(crate) struct Slab<T, K = T> {
    places: Vec<Slot<T>>,
    free: Vec<u32>,
    kind: PhantomData<fn() -> K>,
}

impl<T, K> Default for Slab<T, K> {
    fn default() -> Self {
        Slab {
            places: Vec::new(),
            free: Vec::new(),
            kind: PhantomData,
        }
    }
}

impl<T, K> Slab<T, K> {
    pub(crate) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub(crate) fn insert(&mut self, value: T) -> Key<K> {
        if let Some(slot) = self.free.pop() {
            let place = &mut self.places[slot as usize];
            place.value = Some(value);
            return Key::new(slot, place.generation);
        }
        let slot = u32::try_from(self.places.len()).expect("tables are bounded far below 2^32");
        self.places.push(Slot {
            generation: 0,
            value: Some(value),
        });
        Key::new(slot, 0)
    }

    /// The key that the next insertion gets.
    pub(crate) fn next_key(&self) -> Key<K> {
        match self.free.last() {
            Some(&slot) => Key::new(slot, self.places[slot as usize].generation),
            None => Key::new(
                u32::try_from(self.places.len()).expect("tables are bounded far below 2^32"),
                0,
            ),
        }
    }

    pub(crate) fn remove(&mut self, key: Key<K>) -> Option<T> {
        let place = self.places.get_mut(key.slot as usize)?;
        if place.generation != key.generation {
            return None;
        }
        let value = place.value.take()?;
        place.generation = place.generation.wrapping_add(1);
        self.free.push(key.slot);
        Some(value)
    }

    #[inline]
    pub(crate) fn at(&self, key: Key<K>) -> Option<&T> {
        let place = self.places.get(key.slot as usize)?;
        if place.generation == key.generation {
            place.value.as_ref()
        } else {
            None
        }
    }

    #[inline]
    pub(crate) fn at_mut(&mut self, key: Key<K>) -> Option<&mut T> {
        let place = self.places.get_mut(key.slot as usize)?;
        if place.generation == key.generation {
            place.value.as_mut()
        } else {
            None
        }
    }

    /// The value in a slot, whatever its generation.
    #[inline]
    pub(crate) fn in_slot(&self, slot: u32) -> Option<(Key<K>, &T)> {
        let place = self.places.get(slot as usize)?;
        Some((Key::new(slot, place.generation), place.value.as_ref()?))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Key<K>, &T)> {
        (0..self.places.len() as u32).filter_map(|slot| self.in_slot(slot))
    }

    /// The first value from `slot` on, so that an iteration can continue while values are removed.
    pub(crate) fn from(&self, slot: u32) -> Option<(Key<K>, &T)> {
        (slot..self.places.len() as u32).find_map(|slot| self.in_slot(slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_stale() {
        let mut slab: Slab<char> = Slab::default();
        let (a, b) = (slab.insert('a'), slab.insert('b'));
        assert_eq!((slab.remove(a), slab.remove(a)), (Some('a'), None));
        let c = slab.insert('c');
        assert_eq!((c.slot, c.generation), (a.slot, 1));
        assert_eq!(
            (slab.at(a), slab.at(b), slab.at(c)),
            (None, Some(&'b'), Some(&'c'))
        );
        assert_eq!(slab.len(), 2);
        assert_eq!(slab.iter().map(|(_, v)| *v).collect::<String>(), "cb");
    }
}

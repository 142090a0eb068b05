//! Types of numbers in a block, by their names in numpy's notation.

/// A number of fixed size, stored little-endian.
pub trait Element: Copy + Default + PartialEq + std::fmt::Debug + Send + Sync + 'static {
    /// Its name in numpy's notation.
    const DTYPE: &'static str;

    /// Bytes of one.
    const BYTES: usize = size_of::<Self>();

    /// Reads one from its bytes, of which there are [`Element::BYTES`].
    fn from_le(bytes: &[u8]) -> Self;

    /// Writes one into its bytes, of which there are [`Element::BYTES`].
    fn to_le(self, bytes: &mut [u8]);
}

macro_rules! elements {
    ($($type:ty, $name:literal;)*) => {
        $(impl Element for $type {
            const DTYPE: &'static str = $name;

            fn from_le(bytes: &[u8]) -> Self {
                <$type>::from_le_bytes(bytes.try_into().expect("the size of the block"))
            }

            fn to_le(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }
        })*
    };
}

elements! {
    u8, "|u1"; u16, "<u2"; u32, "<u4"; u64, "<u8";
    i8, "|i1"; i16, "<i2"; i32, "<i4"; i64, "<i8";
    f32, "<f4"; f64, "<f8";
}

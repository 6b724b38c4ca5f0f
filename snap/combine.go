package snap

import "hash/crc32"

// combine returns the checksum of what has the checksum a, followed by size bytes that
// have the checksum b, without reading either. It is how the checksum of a file follows
// from those of the chunks it came in.
//
// A checksum is the remainder of a polynomial over GF(2), so bytes that follow multiply
// it by x^8 each; the complements of its beginning and its end cancel out. (As in zlib's
// crc32_combine, by Mark Adler.)
func combine(a, b uint32, size int64) uint32 { return product(powerOfX(8*uint64(size)), a) ^ b }

// one is the polynomial 1: the highest bit stands for the lowest power.
const one = uint32(1) << 31

// product returns a times b modulo the polynomial of the checksum.
func product(a, b uint32) uint32 {
	p := uint32(0)
	for ; a != 0; a <<= 1 {
		if a&one != 0 {
			p ^= b
		}
		odd := b & 1
		b >>= 1
		if odd != 0 {
			b ^= crc32.Castagnoli
		}
	}
	return p
}

// powerOfX returns x to the power of n.
func powerOfX(n uint64) uint32 {
	p, square := one, one>>1
	for ; n > 0; n >>= 1 {
		if n&1 != 0 {
			p = product(square, p)
		}
		square = product(square, square)
	}
	return p
}

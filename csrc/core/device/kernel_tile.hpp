// The shape of a tile and of the block that transposes it, or casts, for kernels.cu (compiled apart, for the
// GPU) and for the code that launches them.
#pragma once

namespace pyint8 {

// A tile's edge, and the threads of a block in x. 32 fp16 are 64 bytes, two whole sectors, on either side.
inline constexpr unsigned kTile = 32;
// Threads of a block in y: each moves kTile / kRows elements of a tile.
inline constexpr unsigned kRows = 8;

// Elements that a thread casts, 16 bytes of fp16, and those that a block does.
inline constexpr unsigned kCastWidth = 8;
inline constexpr unsigned kCastElements = kTile * kRows * kCastWidth;

}  // namespace pyint8

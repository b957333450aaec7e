// A small pool of threads for loops over chunks of unequal cost.
#pragma once

#include <cstdint>

namespace n2n {

using ChunkFunction = void (*)(const void* context, int64_t chunk);

// Calls function(context, chunk) once for each chunk in [0, chunks), on at most `threads` threads, the caller among
// them. Chunks are claimed one by one, so a thread that comes late costs nothing. The function must not throw.
// Threads are started when first needed, sleep between calls, and are started anew in a forked child.
void run_chunks(int64_t chunks, int threads, ChunkFunction function, const void* context);

// The same for anything callable as body(chunk).
template <class Body>
void parallel_for(int64_t chunks, int threads, const Body& body) {
  run_chunks(
      chunks, threads, [](const void* context, int64_t chunk) { (*static_cast<const Body*>(context))(chunk); }, &body);
}

}  // namespace n2n

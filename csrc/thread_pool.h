// A small pool of threads for loops over chunks of unequal cost.
#pragma once

#include <cstdint>
#include <functional>

namespace n2n {

// Calls body(chunk) once for each chunk in [0, chunks), on at most `threads` threads, the caller among them. Chunks are
// claimed one by one, so a thread that comes late costs nothing. The body must not throw. Threads are started when
// first needed, sleep between calls, and are started anew in a forked child.
void parallel_for(int64_t chunks, int threads, const std::function<void(int64_t)>& body);

}  // namespace n2n

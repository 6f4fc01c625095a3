// Bytes between the processes of a host, through memory that all of them map.
//
// Each rank has an outbox: a file in memory, with a lane to each other rank. A lane is a ring of 4 slots with one
// writer and one reader, so it needs no lock: each of them only advances its own counter. `written` - `read` slots are
// full. A part that is larger than the free slots goes through in turns. Rank 0 sends 6 slots to rank 1:
//
//     rank 0   writes slots 0 1 2 3  rings 1's bell | no room: sleeps        | writes slots 4 5 (places 0 1) ...
//     rank 1   has nothing to read: sleeps          | reads 0 1, rings 0's bell | reads 2 3 4 5, rings 0's bell
//     written  0 ................................ 4 | 4                         | 6
//     read     0 .................................. | 2                         | 6
//
// A rank sleeps on its own bell (a futex), only if the bell has not rung since it last looked at its lanes: so no ring
// is missed. It does not spin, since ranks share cores. Every 10 ms asleep it looks whether the ranks it waits for are
// alive.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "host_memory.h"

namespace dlrm {

struct Bytes {
  char* at;
  int64_t size;
};

// The bytes that go to a rank, or come from it. A transfer has at most one part to and one part from each rank.
struct Part {
  int rank;
  Bytes bytes;
  bool adds = false;  // incoming floats are added to what is there, part after part in the order given
  int64_t done = 0;   // bytes
  bool is_done = false;  // not the same as done == size at first: an empty part takes a slot, too
};

class Lanes {
 public:
  // Makes the outbox of this rank, one of `world`.
  //
  // Throws std::runtime_error if there is no memory.
  Lanes(int rank, int world);
  Lanes(const Lanes&) = delete;

  // Call its `open` before the first transfer.
  HostMemory& memory() { return memory_; }

  // Sends and receives all parts. All ranks call this the same number of times, with parts that match.
  //
  // Throws std::runtime_error if a rank sent another number of bytes than expected, if a rank we wait for has exited or
  // left, or after `leave`. The object is unusable afterwards.
  void transfer(std::vector<Part> outgoing, std::vector<Part> incoming);

  // Tells all ranks that this one sends nothing more. A `transfer` that runs in another thread soon throws, and so do
  // those of other ranks that wait for this one.
  void leave();

 private:
  struct Lane;
  struct Outbox;

  Outbox& outbox(int rank) const;
  Lane& lane(int from, int to) const;
  char* slot(int from, int to, uint32_t number) const;
  bool send(Part& part);
  bool receive(Part& part);
  void wake(int rank);
  bool sleep(uint32_t bell);
  void check_present(int rank) const;

  const int rank_, world_;
  const int64_t slot_bytes_;
  HostMemory memory_;
  uint32_t transfers_ = 0;
};

}  // namespace dlrm

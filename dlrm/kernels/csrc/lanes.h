// Bytes between the processes of a host, through memory that all of them map.
//
// Each rank has an outbox: a file in memory, with a lane to each other rank. A lane is a ring of slots with one writer and
// one reader. A rank with nothing to do sleeps (futex) until another has written or read for it.
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

// What goes to a rank, or comes from one; at most one of each in a transfer.
struct Part {
  int rank;
  Bytes bytes;
  bool adds = false;  // what comes: floats, to what is there. Such parts are added in their order
  int64_t done = 0;
  bool is_done = false;  // an empty part takes a slot, too
};

class Lanes {
 public:
  // Makes this rank's outbox, for `world` ranks.
  //
  // Throws std::runtime_error where there is no memory.
  Lanes(int rank, int world);
  Lanes(const Lanes&) = delete;

  // Of which `open` must be called first.
  HostMemory& memory() { return memory_; }

  // Sends and receives all parts. Every rank calls this with parts that match, in the same order.
  //
  // Throws std::runtime_error if a rank sent another number of bytes, or one that is waited for has ended or left, and after
  // `leave`. No other call may follow then.
  void transfer(std::vector<Part> outgoing, std::vector<Part> incoming);

  // Nothing is sent any more. Ends a `transfer` of another thread soon, and of ranks that wait for this one.
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

// Bytes between the processes of a host, through memory that all of them map.
//
// Each rank has an outbox: a file in memory, with a lane to each other rank. A lane is a ring of slots with one writer and
// one reader. A rank with nothing to do sleeps (futex) until another has written or read for it.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace dlrm {

// `count` rows of `bytes` each, `pitch` apart.
struct Rows {
  char* at;
  int64_t bytes;
  int64_t count = 1;
  int64_t pitch = 0;

  int64_t size() const { return bytes * count; }
};

// Of equal size.
void copy(const Rows& from, const Rows& to);

// What goes to a rank, or comes from one; at most one of each in a transfer.
struct Part {
  int rank;
  Rows rows;
  bool adds = false;  // what comes: a row of floats, to what is there. Such parts are added in their order
  int64_t done = 0;
};

class Lanes {
 public:
  // Makes this rank's outbox, for `world` ranks.
  //
  // Throws std::runtime_error where there is no memory.
  Lanes(int rank, int world);
  Lanes(const Lanes&) = delete;
  ~Lanes();

  // This process, and its outbox's file: what other ranks need for `open`.
  int64_t process() const;
  int64_t file() const { return files_[rank_]; }

  // Maps the other ranks' outboxes.
  //
  // Throws std::runtime_error where the system refuses that.
  void open(const std::vector<int64_t>& processes, const std::vector<int64_t>& files);

  // Sends and receives all parts. Every rank calls this with parts that match, in the same order.
  //
  // Throws std::runtime_error if a rank sent another number of bytes, or has ended, and after `stop`. No other call may
  // follow then.
  void transfer(std::vector<Part> outgoing, std::vector<Part> incoming);

  // Ends a `transfer` of another thread soon.
  void stop() { is_stopped_ = true; }

 private:
  struct Lane;
  struct Outbox;

  Outbox* map(int file);
  Lane& lane(int from, int to) const;
  char* slot(int from, int to, uint32_t number) const;
  bool send(Part& part);
  bool receive(Part& part);
  void wake(int rank);
  void sleep(uint32_t bell);
  bool has_ended(int rank) const;

  const int rank_, world_;
  const int64_t slot_bytes_, outbox_bytes_;
  std::vector<int> files_;
  std::vector<Outbox*> outboxes_;
  std::atomic<bool> is_stopped_{false};
};

}  // namespace dlrm

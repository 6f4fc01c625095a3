// Memory that the ranks of a host share: each rank makes a part, and all of them map all parts.
#pragma once

#include <cstdint>
#include <vector>

namespace dlrm {

constexpr int64_t kLine = 64;  // bytes of a cache line

class HostMemory {
 public:
  // Makes this rank's part, a file in memory filled with zeros. All ranks must ask for the same size.
  //
  // Throws std::runtime_error if there is no memory.
  HostMemory(int rank, int world, int64_t bytes);
  HostMemory(const HostMemory&) = delete;
  ~HostMemory();

  // What other ranks need to open this rank's part: its process, the file in it, and a random number by which the file
  // proves to be the right one.
  struct Address {
    int64_t process = -1, file = -1, token = 0;
  };
  Address address() const;

  // Maps the other ranks' parts.
  //
  // Throws std::runtime_error if the system refuses, if a process number means another process here (containers), or if
  // a rank's part has another size.
  void open(const std::vector<Address>& addresses);
  // Closes all files; what is mapped stays mapped. From then on no rank can open this part, and `has_ended` may not be
  // called.
  void close_files();

  // A rank's part, at a multiple of kLine; null if it is not mapped.
  char* of(int rank) const;
  // Whether the rank's process has exited or has closed its file.
  bool has_ended(int rank) const;

 private:
  char* map(int file) const;

  const int rank_;
  const int64_t file_bytes_;
  std::vector<int> files_;
  std::vector<char*> maps_;
};

}  // namespace dlrm

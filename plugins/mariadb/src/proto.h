/* Agent socket protocol v1 (connector/PROTOCOL.md): frames, no input/output.
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KEYWARD_PROTO_H
#define KEYWARD_PROTO_H

#include "keyward.h"

/* u32 length, u8 op, u32 seq; length counts what follows itself. */
#define KW_HEADER 9
#define KW_MIN_LENGTH 5
#define KW_MAX_LENGTH 65536
#define KW_MAX_FRAME (4 + KW_MAX_LENGTH)

enum kw_op {
  KW_OP_HELLO = 0x01,
  KW_OP_LIST = 0x02,
  KW_OP_GET = 0x03,
  KW_OP_WAIT = 0x04,
  KW_OP_REPORT = 0x05,
  KW_OP_REPLY = 0x80, /* request op | KW_OP_REPLY */
  KW_OP_ERROR = 0xff
};

struct kw_header {
  uint32_t body; /* bytes that follow the header */
  uint32_t seq;
  uint8_t op;
};

struct kw_hello {
  const char *instance;
  const uint8_t *nonce; /* 16 bytes, random per process */
  bool cold;
};

struct kw_hello_reply {
  char instance[256];
  char endpoints[512];
  uint32_t refresh_ms;
};

struct kw_list_entry {
  uint32_t id, latest;
  enum kw_state state;
  char keyring[256];
  uint16_t count;
  const uint8_t *versions; /* count big-endian u32, ascending */
};

struct kw_list {
  uint64_t generation;
  uint16_t left;
  const uint8_t *next, *end;
};

/* The encoders write one whole frame and return its size; 0 if it does not
   fit cap. */
size_t kw_put_hello(uint8_t *b, size_t cap, uint32_t seq, const struct kw_hello *h);
size_t kw_put_list(uint8_t *b, size_t cap, uint32_t seq);
size_t kw_put_get(uint8_t *b, size_t cap, uint32_t seq, uint32_t id, uint32_t version);
size_t kw_put_wait(uint8_t *b, size_t cap, uint32_t seq, uint64_t generation, uint32_t ms);
size_t kw_put_report(uint8_t *b, size_t cap, uint32_t seq, const struct kw_use *u, size_t n);

/* The parsers return false for anything but exactly one well-formed value of
   exactly n bytes, and leave *out unspecified then. */
bool kw_get_header(const uint8_t b[KW_HEADER], struct kw_header *out);
bool kw_get_hello_reply(const uint8_t *b, size_t n, struct kw_hello_reply *out);
bool kw_get_list(const uint8_t *b, size_t n, struct kw_list *out); /* checks every entry */
bool kw_list_next(struct kw_list *l, struct kw_list_entry *out);   /* false: no more */
bool kw_get_key(const uint8_t *b, size_t n, uint32_t id, uint32_t version, uint8_t key[KW_KEY_SIZE]);
bool kw_get_generation(const uint8_t *b, size_t n, uint64_t *out);
bool kw_get_error(const uint8_t *b, size_t n, struct kw_error *out);

uint32_t kw_u32(const uint8_t *b);

#endif

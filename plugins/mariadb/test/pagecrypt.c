/* pagecrypt: time of one 16 KiB page through the plugin's crypt functions and
   through the server's own (my_aes_crypt_* of libmariadbd, the same source and
   version as mariadbd), in turn in one run. Each page is one init, update and
   finish with a fresh IV, the sequence of the server's encryption_crypt(), and
   the pages go round several tablespaces, each with its own key, as a page
   cleaner's do.

     pagecrypt [rounds [pages [tablespaces]]]

   prints one line per round and cipher:
     <cipher> <direction> <ours ns/page> <builtin ns/page>
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#undef MYSQL_DYNAMIC_PLUGIN /* call my_aes_* directly, not through a service */
#include "keyward.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <my_global.h>
#include <mysql/service_encryption.h>
#include <mysql/service_my_crypt.h>

#define PAGE 16384
#define KEY 16 /* InnoDB's key of a tablespace: AES-128, derived from ours */
#define MAX_SPACES 64

struct kw_settings kw_settings;

enum kw_class kw_fail(struct kw_error *e, enum kw_class c, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(e->text, sizeof e->text, fmt, ap);
  va_end(ap);
  return e->class = c;
}

static unsigned char page[PAGE + 32], out_ours[PAGE + 32], out_builtin[PAGE + 32], keys[MAX_SPACES][KEY];
static unsigned spaces = 4;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void must(int rc, const char *what) {
  if (rc) {
    fprintf(stderr, "pagecrypt: %s failed: %d\n", what, rc);
    exit(1);
  }
}

static void ours(const unsigned char *key, const unsigned char *iv, int flags) {
  unsigned char ctx[1040] __attribute__((aligned(16)));
  unsigned d1, d2;
  must(kw_crypt_ctx_size(1, 1) > sizeof ctx, "context size");
  must(kw_crypt_ctx_init(ctx, key, KEY, iv, 16, flags, 1, 1), "init");
  must(kw_crypt_ctx_update(ctx, page, PAGE, out_ours, &d1), "update");
  must(kw_crypt_ctx_finish(ctx, out_ours + d1, &d2), "finish");
}

static void builtin(enum my_aes_mode mode, const unsigned char *key, const unsigned char *iv, int flags) {
  unsigned char ctx[MY_AES_CTX_SIZE] __attribute__((aligned(16)));
  unsigned d1, d2;
  must(my_aes_crypt_init(ctx, mode, flags, key, KEY, iv, 16), "built-in init");
  must(my_aes_crypt_update(ctx, page, PAGE, out_builtin, &d1), "built-in update");
  must(my_aes_crypt_finish(ctx, out_builtin + d1, &d2), "built-in finish");
}

static double run(bool mine, enum my_aes_mode mode, int flags, unsigned pages) {
  unsigned char iv[16] = {0};
  uint64_t begin = now_ns();
  for (uint32_t i = 0; i < pages; i++) {
    memcpy(iv + 4, &i, sizeof i);
    if (mine)
      ours(keys[i % spaces], iv, flags);
    else
      builtin(mode, keys[i % spaces], iv, flags);
  }
  return (double)(now_ns() - begin) / pages;
}

static void compare(enum kw_cipher c, enum my_aes_mode mode, int flags, const char *name, unsigned pages) {
  double a, b;
  static bool flip;
  flip = !flip;
  kw_settings.cipher = c;
  if (flip) {
    a = run(true, mode, flags, pages);
    b = run(false, mode, flags, pages);
  } else {
    b = run(false, mode, flags, pages);
    a = run(true, mode, flags, pages);
  }
  must(memcmp(out_ours, out_builtin, PAGE), "comparison of the results");
  printf("%s %s %.0f %.0f\n", name, flags & ENCRYPTION_FLAG_ENCRYPT ? "encrypt" : "decrypt", a, b);
}

int main(int argc, char **argv) {
  struct kw_error e;
  unsigned rounds = argc > 1 ? (unsigned)atoi(argv[1]) : 9, pages = argc > 2 ? (unsigned)atoi(argv[2]) : 20000;
  if (argc > 3)
    spaces = (unsigned)atoi(argv[3]);
  if (argc > 4 || rounds == 0 || pages == 0 || spaces == 0 || spaces > MAX_SPACES) {
    fprintf(stderr, "usage: pagecrypt [rounds [pages [tablespaces 1..%d]]]\n", MAX_SPACES);
    return 2;
  }
  must(!kw_crypt_init(&e), "start");
  for (unsigned i = 0; i < spaces; i++)
    memset(keys[i], (int)i + 1, KEY);
  for (unsigned i = 0; i < PAGE; i++)
    page[i] = (unsigned char)(i * 7);
  const int nopad = ENCRYPTION_FLAG_NOPAD, enc = nopad | ENCRYPTION_FLAG_ENCRYPT;
  run(true, MY_AES_CTR, enc, pages / 10 + 1); /* warm both */
  run(false, MY_AES_CTR, enc, pages / 10 + 1);
  for (unsigned r = 0; r < rounds; r++) {
    compare(KW_CTR, MY_AES_CTR, enc, "ctr", pages);
    compare(KW_CTR, MY_AES_CTR, nopad, "ctr", pages);
    compare(KW_CBC, MY_AES_CBC, enc, "cbc", pages);
    compare(KW_CBC, MY_AES_CBC, nopad, "cbc", pages);
  }
  kw_crypt_destroy();
  return 0;
}

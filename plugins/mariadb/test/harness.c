/* harness: plays the server for the plugin's code, under ASan and UBSan.

     harness crypt                   our crypt functions against the server's own
     harness frames SEED COUNT       mutated frames through every parser
     harness golden FILE             the protocol's golden frames ("name hex" lines)
     harness session SOCKET COUNT    COUNT lives of the plugin with the agent there

   Exit status 0 means that nothing was found; every finding is one line.
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "proto.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <my_global.h>
#include <mysql/plugin_encryption.h>
#include <mysql/service_encryption.h>
#include <mysql/service_my_print_error.h>

/* Of libmariadbd, the embedded server: same source and version as mariadbd.
   Declared here because the plugin's build makes the header a service. */
enum aes_mode { AES_ECB, AES_CBC, AES_CTR, AES_GCM };
#undef my_aes_crypt_init
#undef my_aes_crypt_update
#undef my_aes_crypt_finish
extern int server_init(void *, enum aes_mode, int, const unsigned char *, unsigned, const unsigned char *, unsigned) __asm__("my_aes_crypt_init");
extern int server_update(void *, const unsigned char *, unsigned, unsigned char *, unsigned *) __asm__("my_aes_crypt_update");
extern int server_finish(void *, unsigned char *, unsigned *) __asm__("my_aes_crypt_finish");
#define SERVER_CTX 1040

extern struct st_maria_plugin _maria_plugin_declarations_[];
extern void (*error_handler_hook)(unsigned, const char *, myf) __attribute__((weak));

static struct st_mariadb_encryption *plugin;
static int findings;

static void found(const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  vprintf(fmt, ap);
  va_end(ap);
  putchar('\n');
  if (++findings > 20)
    exit(1);
}

/* ---- a repeatable source of numbers ------------------------------------------- */

static uint64_t seed = 1;

static uint32_t rnd(uint32_t below) {
  seed ^= seed << 13;
  seed ^= seed >> 7;
  seed ^= seed << 17;
  return below ? (uint32_t)((seed >> 11) % below) : 0;
}

static void fill(uint8_t *b, size_t n) {
  for (size_t i = 0; i < n; i++)
    b[i] = (uint8_t)rnd(256);
}

/* ---- crypt ---------------------------------------------------------------------- */

struct job {
  enum kw_cipher cipher;
  int flags;
  unsigned klen, slen, split; /* split: bytes of the first of two updates */
  uint8_t key[32], iv[16];
};

static enum aes_mode server_mode(const struct job *j) {
  if (j->cipher == KW_CBC)
    return AES_CBC;
  return j->flags & ENCRYPTION_FLAG_NOPAD ? AES_CTR : AES_GCM;
}

/* Both sides get exactly sized heap buffers, so that ASan sees an overrun. */
static int run_ours(const struct job *j, const uint8_t *src, uint8_t *dst, unsigned *dlen) {
  uint8_t *ctx = malloc(plugin->crypt_ctx_size(1, 1));
  unsigned d = 0, n = 0;
  kw_settings.cipher = j->cipher;
  int rc = plugin->crypt_ctx_init(ctx, j->key, j->klen, j->iv, 16, j->flags, 1, 1);
  if (!rc) {
    rc = plugin->crypt_ctx_update(ctx, src, j->split, dst, &d);
    n = d;
    if (!rc && j->split < j->slen)
      rc = plugin->crypt_ctx_update(ctx, src + j->split, j->slen - j->split, dst + n, &d), n += d;
    int last = plugin->crypt_ctx_finish(ctx, dst + n, &d);
    n += d;
    rc = rc ? rc : last;
  }
  *dlen = n;
  free(ctx);
  return rc;
}

static int run_server(const struct job *j, const uint8_t *src, uint8_t *dst, unsigned *dlen) {
  uint8_t ctx[SERVER_CTX] __attribute__((aligned(16)));
  unsigned d = 0, n = 0;
  int rc = server_init(ctx, server_mode(j), j->flags, j->key, j->klen, j->iv, 16);
  if (rc)
    return rc;
  rc = server_update(ctx, src, j->split, dst, &d);
  n = d;
  if (!rc && j->split < j->slen)
    rc = server_update(ctx, src + j->split, j->slen - j->split, dst + n, &d), n += d;
  int last = server_finish(ctx, dst + n, &d);
  *dlen = n + d;
  return rc ? rc : last;
}

static void compare(struct job *j) {
  uint8_t *src = malloc(j->slen + 1), *a = malloc(j->slen + 32), *b = malloc(j->slen + 32);
  unsigned an = 0, bn = 0;
  fill(src, j->slen);
  j->flags |= ENCRYPTION_FLAG_ENCRYPT;
  int ra = run_ours(j, src, a, &an), rb = run_server(j, src, b, &bn);
  if (ra != rb || an != bn || memcmp(a, b, an))
    found("encrypt: cipher %d flags %d klen %u length %u split %u: %d/%u, the server %d/%u", j->cipher, j->flags, j->klen, j->slen, j->split, ra, an, rb, bn);
  bool nopad = j->flags & ENCRYPTION_FLAG_NOPAD;
  unsigned want = nopad ? j->slen : plugin->encrypted_length(j->slen, 1, 1);
  if (an != want)
    found("cipher %d flags %d length %u: %u bytes, %u announced", j->cipher, j->flags, j->slen, an, want);
  struct job back = *j;
  back.flags &= ~ENCRYPTION_FLAG_ENCRYPT;
  back.slen = back.split = an; /* GCM is decrypted in one piece */
  uint8_t *c = malloc(an + 32);
  unsigned cn = 0;
  if (run_ours(&back, a, c, &cn) || cn != j->slen || memcmp(c, src, cn))
    found("decrypt: cipher %d flags %d klen %u length %u", j->cipher, j->flags, j->klen, j->slen);
  if (!nopad && an) { /* a flipped bit: the same verdict as the server's */
    a[rnd(an)] ^= 1;
    ra = run_ours(&back, a, c, &cn);
    rb = run_server(&back, a, b, &bn);
    if ((ra != 0) != (rb != 0) || (j->cipher == KW_CTR && ra == 0))
      found("tampered: cipher %d length %u: %d, the server %d", j->cipher, j->slen, ra, rb);
  }
  free(src), free(a), free(b), free(c);
}

/* More contexts open at once than a thread keeps. */
static void nested(void) {
  enum { DEPTH = 30, LEN = 100 };
  uint8_t ctx[DEPTH][128], key[32], iv[16], src[LEN], out[DEPTH][LEN + 32];
  unsigned d, n[DEPTH];
  fill(key, 32), fill(iv, 16), fill(src, LEN);
  kw_settings.cipher = KW_CTR;
  if (plugin->crypt_ctx_size(1, 1) > sizeof ctx[0])
    found("context is larger than the test's");
  for (int i = 0; i < DEPTH; i++)
    if (plugin->crypt_ctx_init(ctx[i], key, 32, iv, 16, ENCRYPTION_FLAG_ENCRYPT, 1, 1))
      found("nested init %d", i);
  for (int i = 0; i < DEPTH; i++)
    plugin->crypt_ctx_update(ctx[i], src, LEN, out[i], &n[i]);
  for (int i = DEPTH - 1; i >= 0; i--) {
    if (plugin->crypt_ctx_finish(ctx[i], out[i] + n[i], &d) || n[i] + d != LEN + 16)
      found("nested finish %d", i);
    if (memcmp(out[i], out[DEPTH - 1], LEN + 16))
      found("nested context %d differs", i);
  }
}

static void refusals(void) {
  uint8_t ctx[128], b[64] = {0};
  unsigned d;
  const int modes[] = {0, ENCRYPTION_FLAG_NOPAD};
  for (unsigned i = 0; i < 4; i++) {
    kw_settings.cipher = i & 1 ? KW_CBC : KW_CTR;
    int f = modes[i / 2];
    for (unsigned klen = 0; klen < 40; klen++) {
      if (klen == 16 || klen == 24 || klen == 32)
        continue;
      if (plugin->crypt_ctx_init(ctx, b, klen, b, 16, f, 1, 1) == 0)
        found("key of %u bytes accepted", klen);
      if (plugin->crypt_ctx_finish(ctx, b, &d) == 0)
        found("finish after a refused init");
    }
    if (plugin->crypt_ctx_init(ctx, b, 32, b, 11, f, 1, 1) == 0)
      found("IV of 11 bytes accepted");
  }
}

static int crypt_tests(void) {
  struct kw_error e;
  if (!kw_crypt_init(&e))
    found("start: %s", e.text);
  const unsigned klens[] = {16, 24, 32};
  for (unsigned i = 0; i < 3000; i++) {
    struct job j = {.cipher = i & 1 ? KW_CBC : KW_CTR, .flags = i & 2 ? ENCRYPTION_FLAG_NOPAD : 0, .klen = klens[i / 4 % 3]};
    j.slen = i % 40 == 0 ? 16384 : i < 1500 ? i / 12 : rnd(5000);
    j.split = rnd(3) ? j.slen : rnd(j.slen + 1);
    fill(j.key, 32);
    if (rnd(2)) /* a key seen before: the kept context is used */
      memset(j.key, (int)rnd(4), 32);
    fill(j.iv, 16);
    compare(&j);
  }
  nested();
  refusals();
  kw_crypt_destroy();
  return findings != 0;
}

/* ---- frames ----------------------------------------------------------------------- */

static const uint8_t sample_key[32] = "0123456789abcdef0123456789abcde";

/* A correct reply body of every kind. */
static size_t sample(unsigned kind, uint8_t *b) {
  static const uint8_t hello[] = "\0\6orders\0\4kms1\0\0\x13\x88";
  static const uint8_t list[] = "\0\0\0\0\0\0\0\5\0\2"
                                "\0\0\0\1\0\0\0\3\1\0\3v/a\0\2\0\0\0\1\0\0\0\3"
                                "\0\1\0\0\0\0\0\1\2\0\3v/b\0\1\0\0\0\1";
  static const uint8_t error[] = "\0\2\0\5never";
  size_t n = 0;
  switch (kind) {
  case 0: memcpy(b, hello, n = sizeof hello - 1); break;
  case 1: memcpy(b, list, n = sizeof list - 1); break;
  case 2:
    memcpy(b, "\0\0\0\1\0\0\0\3\x20", 9);
    memcpy(b + 9, sample_key, 32);
    n = 41;
    break;
  case 3: memcpy(b, "\0\0\0\0\0\0\0\5", n = 8); break;
  default: memcpy(b, error, n = sizeof error - 1); break;
  }
  return n;
}

static bool walk_list(struct kw_list *l) {
  struct kw_list_entry e;
  unsigned n = 0, want = l->left;
  while (kw_list_next(l, &e)) {
    uint32_t last = 0;
    bool has_latest = false;
    n++;
    for (unsigned i = 0; i < e.count; i++) {
      uint32_t v = kw_u32(e.versions + 4 * i);
      if (v <= last)
        found("versions are not ascending");
      last = v;
      has_latest |= v == e.latest;
    }
    if (e.id == 0 || !has_latest || strlen(e.keyring) >= sizeof e.keyring)
      found("a bad list entry was accepted");
  }
  if (n != want)
    found("list: %u of %u entries", n, want);
  return true;
}

/* Parses n bytes, in a buffer of exactly that size. */
static bool parse(unsigned kind, const uint8_t *from, size_t n) {
  uint8_t *b = malloc(n ? n : 1), key[32];
  struct kw_hello_reply h;
  struct kw_list l;
  struct kw_error e;
  uint64_t g;
  bool ok;
  memcpy(b, from, n);
  switch (kind) {
  case 0: ok = kw_get_hello_reply(b, n, &h); break;
  case 1: ok = kw_get_list(b, n, &l) && walk_list(&l); break;
  case 2: ok = kw_get_key(b, n, 1, 3, key); break;
  case 3: ok = kw_get_generation(b, n, &g); break;
  default: ok = kw_get_error(b, n, &e); break;
  }
  free(b);
  return ok;
}

static size_t mutate(uint8_t *b, size_t n, size_t cap) {
  for (unsigned i = 1 + rnd(4); i; i--)
    switch (rnd(5)) {
    case 0: n = n ? rnd((uint32_t)n) : 0; break;
    case 1: if (n) b[rnd((uint32_t)n)] ^= (uint8_t)(1 << rnd(8)); break;
    case 2: if (n) b[rnd((uint32_t)n)] = rnd(2) ? 0xff : 0; break;
    case 3: if (n < cap) b[n++] = (uint8_t)rnd(256); break;
    default: if (n > 4) memmove(b + 2, b, n - 2 - rnd(2)); break;
    }
  return n;
}

static int frame_tests(unsigned count) {
  uint8_t b[512], head[KW_HEADER];
  struct kw_header h;
  for (unsigned kind = 0; kind < 5; kind++) {
    size_t n = sample(kind, b);
    if (!parse(kind, b, n))
      found("sample %u is refused", kind);
    for (size_t cut = 0; cut < n; cut++)
      if (parse(kind, b, cut))
        found("sample %u cut to %zu is accepted", kind, cut);
    b[n] = 0;
    if (parse(kind, b, n + 1))
      found("sample %u with a trailing byte is accepted", kind);
  }
  unsigned accepted = 0;
  for (unsigned i = 0; i < count; i++) {
    size_t n = sample(i % 5, b);
    accepted += parse(i % 5, b, mutate(b, n, sizeof b));
    fill(head, sizeof head);
    if (kw_get_header(head, &h) && h.body > KW_MAX_LENGTH - KW_MIN_LENGTH)
      found("a header announces %u bytes", h.body);
  }
  printf("frames: %u mutated, %u still well-formed\n", count, accepted);
  return findings != 0;
}

/* ---- golden frames ------------------------------------------------------------------ */

static size_t unhex(const char *s, uint8_t *b, size_t cap) {
  size_t n = 0;
  for (unsigned v; n < cap && sscanf(s + 2 * n, "%2x", &v) == 1; n++)
    b[n] = (uint8_t)v;
  return n;
}

/* What a request of that name must look like; 0 if it is none. */
static size_t golden_request(const char *name, uint8_t *b, size_t cap) {
  uint8_t nonce[16];
  for (unsigned i = 0; i < 16; i++)
    nonce[i] = (uint8_t)i;
  struct kw_use uses[] = {{1, 3, 1700000000}, {2, 1, 1700000001}};
  if (strcmp(name, "hello-cold") == 0)
    return kw_put_hello(b, cap, 1, &(struct kw_hello){"shop", nonce, true});
  if (strcmp(name, "hello-warm") == 0)
    return kw_put_hello(b, cap, 2, &(struct kw_hello){"", nonce, false});
  if (strcmp(name, "list") == 0)
    return kw_put_list(b, cap, 3);
  if (strcmp(name, "get") == 0)
    return kw_put_get(b, cap, 4, 1, 3);
  if (strcmp(name, "wait") == 0)
    return kw_put_wait(b, cap, 5, 0x0102030405060708, 30000);
  if (strcmp(name, "report") == 0)
    return kw_put_report(b, cap, 6, uses, 2);
  return 0;
}

static bool golden_list(const uint8_t *b, size_t n) {
  struct kw_list l;
  struct kw_list_entry x, y;
  if (!kw_get_list(b, n, &l) || l.generation != 0x0102030405060708 || !kw_list_next(&l, &x) || !kw_list_next(&l, &y))
    return false;
  return x.id == 1 && x.latest == 3 && x.count == 2 && x.state == KW_STATE_ACTIVE && !strcmp(x.keyring, "acme/orders") && y.id == 2 && y.latest == 1 && y.state == KW_STATE_STALE && !strcmp(y.keyring, "acme/temp");
}

static bool golden_reply(const char *name, const uint8_t *b, size_t n) {
  struct kw_hello_reply h;
  struct kw_error e;
  uint8_t key[32];
  uint64_t g;
  if (strcmp(name, "hello-reply") == 0)
    return kw_get_hello_reply(b, n, &h) && !strcmp(h.instance, "shop") && !strcmp(h.endpoints, "kms1:7443,kms2:7443") && h.refresh_ms == 3600000;
  if (strcmp(name, "list-reply") == 0)
    return golden_list(b, n);
  if (strcmp(name, "get-reply") == 0)
    return kw_get_key(b, n, 1, 3, key) && key[0] == 0 && key[31] == 31;
  if (strcmp(name, "wait-reply") == 0)
    return kw_get_generation(b, n, &g) && g == 9;
  if (strcmp(name, "error") == 0)
    return kw_get_error(b, n, &e) && e.class == KW_DENIED && !strcmp(e.text, "no");
  return strcmp(name, "report-reply") == 0 && n == 0;
}

static int golden_tests(const char *path) {
  char name[64], hex[4096];
  uint8_t want[2048], got[2048];
  struct kw_header h;
  unsigned lines = 0;
  FILE *f = fopen(path, "r");
  while (f && fscanf(f, "%63s %4095s", name, hex) == 2) {
    size_t n = unhex(hex, want, sizeof want), m = golden_request(name, got, sizeof got);
    lines++;
    if (m ? m != n || memcmp(got, want, n) : !kw_get_header(want, &h) || h.body != n - KW_HEADER || !golden_reply(name, want + KW_HEADER, h.body))
      found("golden frame %s", name);
  }
  if (f)
    fclose(f);
  if (lines != 12)
    found("%u golden frames, want 12", lines);
  printf("golden: %u frames\n", lines);
  return findings != 0;
}

/* ---- session ------------------------------------------------------------------------ */

static void quiet(unsigned nr, const char *fmt, unsigned long flags, ...) {
  (void)nr, (void)flags;
  char line[600];
  va_list ap;
  va_start(ap, flags);
  if (vsnprintf(line, sizeof line, fmt, ap) >= 512)
    found("a log line of more than 511 bytes");
  va_end(ap);
  if (getenv("HARNESS_LOG"))
    fprintf(stderr, "%s\n", line);
}

static struct my_print_error_service_st printer = {.my_printf_error_func = quiet};

static void a_hook(unsigned nr, const char *text, myf flags) { (void)nr, (void)text, (void)flags; }

/* The head of every system variable's structure (mysql/plugin.h). */
struct any_variable {
  MYSQL_PLUGIN_VAR_HEADER;
  void *value;
};

static void *variable(const char *name) {
  for (struct st_mysql_sys_var **v = _maria_plugin_declarations_[0].system_vars; *v; v++)
    if (strcmp(((struct any_variable *)*v)->name, name) == 0)
      return ((struct any_variable *)*v)->value;
  found("no variable %s", name);
  exit(1);
}

/* One life. What the agent answers is the caller's choice, up to garbage: what
   must hold is that nothing crashes, leaks or hangs, and that what was once
   announced stays and has its key. */
static bool life(void) {
  struct kw_error e;
  uint8_t key[32], again[32];
  if (_maria_plugin_declarations_[0].init(NULL))
    return false;
  for (unsigned id = 1; id <= 3; id++) {
    unsigned n = sizeof key, v = plugin->get_latest_key_version(id);
    if (v == ENCRYPTION_KEY_VERSION_INVALID)
      continue;
    if (plugin->get_key(id, v, key, &n) || n != 32)
      found("key id %u: version %u was announced without a key", id, v);
    kw_session_refresh(&e);
    n = 31;
    if (plugin->get_key(id, v, NULL, &n) != ENCRYPTION_KEY_BUFFER_TOO_SMALL || n != 32)
      found("asking for the length");
    n = sizeof again;
    unsigned now = plugin->get_latest_key_version(id);
    if (now == ENCRYPTION_KEY_VERSION_INVALID || now < v || plugin->get_key(id, v, again, &n) || memcmp(key, again, 32))
      found("key id %u: version %u was lost", id, v);
    plugin->get_key(id, v + 1000, again, &n); /* a miss */
  }
  _maria_plugin_declarations_[0].deinit(NULL);
  return true;
}

static int session_tests(char *path, unsigned count) {
  unsigned lived = 0;
  my_print_error_service = &printer;
  if (&error_handler_hook)
    error_handler_hook = a_hook;
  *(char **)variable("socket") = path;
  *(char **)variable("instance") = "";
  *(double *)variable("timeout") = 0.1;
  *(double *)variable("start_timeout") = 0.2;
  for (unsigned i = 0; i < count; i++)
    lived += life();
  printf("session: %u lives, %u started\n", count, lived);
  return findings != 0;
}

int main(int argc, char **argv) {
  plugin = _maria_plugin_declarations_[0].info;
  if (argc == 2 && strcmp(argv[1], "crypt") == 0)
    return crypt_tests();
  if (argc == 4 && strcmp(argv[1], "frames") == 0) {
    seed = strtoull(argv[2], NULL, 10) | 1;
    return frame_tests((unsigned)atoi(argv[3]));
  }
  if (argc == 3 && strcmp(argv[1], "golden") == 0)
    return golden_tests(argv[2]);
  if (argc == 4 && strcmp(argv[1], "session") == 0)
    return session_tests(argv[2], (unsigned)atoi(argv[3]));
  fprintf(stderr, "usage: harness crypt | frames SEED COUNT | golden FILE | session SOCKET COUNT\n");
  return 2;
}

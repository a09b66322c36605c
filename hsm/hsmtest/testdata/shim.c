/* SPDX-License-Identifier: Apache-2.0
 *
 * A PKCS#11 module for tests that forwards to a real one, gives it init
 * arguments (NSS softokn needs a string where the standard reserves a
 * pointer), and misbehaves on order. Environment: KW_SHIM_MODULE (real
 * module), KW_SHIM_INIT (init string, optional), KW_SHIM_CONTROL (a file of
 * 32-bit words shared with the test, optional).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cryptoki.h"

/* Words of the control file; the order is that of hsmtest/shim.go. */
enum {
	DECRYPT_RV,    /* what C_Decrypt answers instead of working ... */
	DECRYPT_COUNT, /* ... so many times */
	DECRYPT_NTH,   /* if set, only each n-th call */
	HANG_COUNT,    /* so many C_Decrypt never return */
	DIE_COUNT,     /* so many C_Decrypt end the process by SIGSEGV */
	LOSE_COUNT,    /* so many C_Decrypt close all sessions first */
	HIDE,          /* bit 0: no AES-GCM, bit 1: no EC */
	SIGN_RV,
	SIGN_COUNT,
	LOGINS, /* counters */
	DECRYPTS,
	SEARCHES,
	INITS,
	HANG_GENERATE,
	HANG_LOGIN,
	SLOW_GENERATE, /* C_GenerateKeyPair and ... */
	SLOW_DECRYPT,  /* ... C_Decrypt take so many milliseconds longer */
	WORDS
};

struct init_args {
	void *create, *destroy, *lock, *unlock;
	kw_ulong flags;
	void *reserved;
};

static struct kw_functions *real, shim;
static uint32_t none[WORDS];
static volatile uint32_t *word = none;

static int spend(int w)
{
	uint32_t n;

	do {
		n = word[w];
		if (n == 0)
			return 0;
	} while (!__sync_bool_compare_and_swap(&word[w], n, n - 1));
	return 1;
}

static void hang(void)
{
	for (;;)
		pause();
}

static kw_ulong initialize(void *p)
{
	struct init_args a = { 0 };
	const char *init = getenv("KW_SHIM_INIT");

	__sync_fetch_and_add(&word[INITS], 1);
	if (init == NULL)
		return real->C_Initialize(p);
	if (p != NULL)
		a = *(struct init_args *) p;
	a.reserved = (void *) init;
	return real->C_Initialize(&a);
}

static kw_ulong login(kw_ulong session, kw_ulong user, kw_byte *pin, kw_ulong length)
{
	__sync_fetch_and_add(&word[LOGINS], 1);
	if (spend(HANG_LOGIN))
		hang();
	return real->C_Login(session, user, pin, length);
}

static kw_ulong decrypt(kw_ulong session, kw_byte *in, kw_ulong n, kw_byte *out, kw_ulong *m)
{
	uint32_t calls = __sync_add_and_fetch(&word[DECRYPTS], 1);

	usleep(word[SLOW_DECRYPT] * 1000);
	if (spend(HANG_COUNT))
		hang();
	if (spend(DIE_COUNT))
		*(volatile int *) 8 = 1;
	if (spend(LOSE_COUNT)) {
		kw_ulong (*slots)(kw_byte, kw_ulong *, kw_ulong *) = (kw_ulong (*)(kw_byte, kw_ulong *, kw_ulong *)) real->C_GetSlotList;
		kw_ulong list[16], count = 16;

		if (slots(1, list, &count) == 0)
			while (count > 0)
				real->C_CloseAllSessions(list[--count]);
	}
	if (word[DECRYPT_NTH] == 0 || calls % word[DECRYPT_NTH] == 0)
		if (spend(DECRYPT_COUNT))
			return word[DECRYPT_RV];
	return real->C_Decrypt(session, in, n, out, m);
}

static kw_ulong sign(kw_ulong session, kw_byte *in, kw_ulong n, kw_byte *out, kw_ulong *m)
{
	if (spend(SIGN_COUNT))
		return word[SIGN_RV];
	return real->C_Sign(session, in, n, out, m);
}

static kw_ulong encrypt_init(kw_ulong session, struct kw_mechanism *mechanism, kw_ulong key)
{
	if ((word[HIDE] & 1) && mechanism->mechanism == 0x1087)
		return 0x70; /* CKR_MECHANISM_INVALID */
	return real->C_EncryptInit(session, mechanism, key);
}

typedef kw_ulong (*generate_pair_fn)(kw_ulong, struct kw_mechanism *, void *, kw_ulong, void *, kw_ulong, kw_ulong *, kw_ulong *);

static kw_ulong generate_pair(kw_ulong session, struct kw_mechanism *mechanism, void *a, kw_ulong n, void *b, kw_ulong m,
	kw_ulong *pub, kw_ulong *priv)
{
	if (spend(HANG_GENERATE))
		hang();
	usleep(word[SLOW_GENERATE] * 1000);
	if ((word[HIDE] & 2) && mechanism->mechanism == 0x1040)
		return 0x70;
	return ((generate_pair_fn) real->C_GenerateKeyPair)(session, mechanism, a, n, b, m, pub, priv);
}

typedef kw_ulong (*search_fn)(kw_ulong, void *, kw_ulong);

static kw_ulong search(kw_ulong session, void *a, kw_ulong n)
{
	__sync_fetch_and_add(&word[SEARCHES], 1);
	return ((search_fn) real->C_FindObjectsInit)(session, a, n);
}

kw_ulong C_GetFunctionList(struct kw_functions **out)
{
	const char *control = getenv("KW_SHIM_CONTROL"), *module = getenv("KW_SHIM_MODULE");
	kw_ulong (*list)(struct kw_functions **);
	void *handle;

	if (real == NULL) {
		handle = module == NULL ? NULL : dlopen(module, RTLD_NOW | RTLD_LOCAL);
		if (handle == NULL)
			return 5;
		list = (kw_ulong (*)(struct kw_functions **)) dlsym(handle, "C_GetFunctionList");
		if (list == NULL || list(&real) != 0)
			return 5;
		if (control != NULL) {
			int fd = open(control, O_RDWR | O_CLOEXEC);
			void *p = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof none, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

			if (p == MAP_FAILED)
				return 5;
			word = p;
		}
		shim = *real;
		shim.C_Initialize = initialize;
		shim.C_Login = login;
		shim.C_Decrypt = decrypt;
		shim.C_Sign = sign;
		shim.C_EncryptInit = encrypt_init;
		shim.C_GenerateKeyPair = (void *) generate_pair;
		shim.C_FindObjectsInit = (void *) search;
	}
	shim.C_GetFunctionList = (void *) C_GetFunctionList;
	*out = &shim;
	return 0;
}

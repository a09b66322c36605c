package hsm

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include "cryptoki.h"

static struct kw_functions *kw_open(const char *path)
{
	kw_ulong (*list)(struct kw_functions **);
	struct kw_functions *f = NULL;
	void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);

	if (handle == NULL)
		return NULL;
	list = (kw_ulong (*)(struct kw_functions **)) dlsym(handle, "C_GetFunctionList");
	if (list == NULL || list(&f) != 0)
		return NULL;
	return f;
}

static kw_ulong kw_login(struct kw_functions *f, kw_ulong session, kw_byte *pin, kw_ulong length)
{
	return f->C_Login(session, 1, pin, length);
}

static kw_ulong kw_oaep_decrypt(struct kw_functions *f, kw_ulong session, kw_ulong key, kw_ulong hash, kw_ulong mgf,
	kw_byte *in, kw_ulong in_length, kw_byte *out, kw_ulong *out_length)
{
	struct kw_oaep p = { hash, mgf, 1, NULL, 0 };
	struct kw_mechanism m = { 0x9, &p, sizeof p };
	kw_ulong rv = f->C_DecryptInit(session, &m, key);

	return rv != 0 ? rv : f->C_Decrypt(session, in, in_length, out, out_length);
}

static kw_ulong kw_gcm_run(struct kw_functions *f, kw_ulong session, kw_ulong key, int encrypt, kw_byte *nonce,
	kw_byte *aad, kw_ulong aad_length, kw_byte *in, kw_ulong in_length, kw_byte *out, kw_ulong *out_length)
{
	struct kw_gcm p = { nonce, 12, 96, aad, aad_length, 128 };
	struct kw_mechanism m = { 0x1087, &p, sizeof p };
	kw_ulong rv = (encrypt ? f->C_EncryptInit : f->C_DecryptInit)(session, &m, key);

	return rv != 0 ? rv : (encrypt ? f->C_Encrypt : f->C_Decrypt)(session, in, in_length, out, out_length);
}

static kw_ulong kw_sign(struct kw_functions *f, kw_ulong session, kw_ulong key, kw_ulong mechanism,
	kw_byte *in, kw_ulong in_length, kw_byte *out, kw_ulong *out_length)
{
	struct kw_mechanism m = { mechanism, NULL, 0 };
	kw_ulong rv = f->C_SignInit(session, &m, key);

	return rv != 0 ? rv : f->C_Sign(session, in, in_length, out, out_length);
}
*/
import "C"

import (
	"crypto"
	"fmt"
	"unsafe"

	"github.com/keyward/keyward/dek"
	"github.com/miekg/pkcs11"
)

// cryptoki calls a module that is already initialised. It does what miekg's
// binding can't: one crossing per operation, into a buffer that we wipe (miekg
// frees plaintexts unwiped on the C heap), no size query (NSS answers it with
// CKR_BUFFER_TOO_SMALL for AES-GCM), and a PIN that is never a Go string.
type cryptoki struct {
	f *C.struct_kw_functions
}

// loadCryptoki gets the function list of a module that is in the process
// already; loading it again gives the same one.
func loadCryptoki(path string) (cryptoki, error) {
	p := C.CString(path)
	defer C.free(unsafe.Pointer(p))
	f := C.kw_open(p)
	if f == nil {
		return cryptoki{}, fmt.Errorf("%w: PKCS#11 module %s: no function list", dek.ErrPrecondition, path)
	}
	return cryptoki{f}, nil
}

func rvError(rv C.kw_ulong) error {
	if rv == pkcs11.CKR_OK {
		return nil
	}
	return pkcs11.Error(rv)
}

// bytePtr is nil for an empty slice. PKCS#11 doesn't write through inputs.
func bytePtr(b []byte) *C.kw_byte { return (*C.kw_byte)(unsafe.Pointer(unsafe.SliceData(b))) }

// login logs the user in, for all sessions of this process (§6.7.4).
func (c cryptoki) login(s pkcs11.SessionHandle, pin []byte) error {
	return rvError(C.kw_login(c.f, C.kw_ulong(s), bytePtr(pin), C.kw_ulong(len(pin))))
}

// decrypt does RSA-OAEP with an empty label into out and returns the length.
// Out must hold a whole modulus.
func (c cryptoki) decrypt(s pkcs11.SessionHandle, key pkcs11.ObjectHandle, h crypto.Hash, in, out []byte) (int, error) {
	hash, mgf := C.kw_ulong(pkcs11.CKM_SHA_1), C.kw_ulong(pkcs11.CKG_MGF1_SHA1)
	if h == crypto.SHA256 {
		hash, mgf = pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256
	}
	n := C.kw_ulong(len(out))
	rv := C.kw_oaep_decrypt(c.f, C.kw_ulong(s), C.kw_ulong(key), hash, mgf, bytePtr(in), C.kw_ulong(len(in)), bytePtr(out), &n)
	return clamp(n, out), rvError(rv)
}

// gcm runs AES-GCM with a 12-byte nonce and a 16-byte tag into out.
func (c cryptoki) gcm(s pkcs11.SessionHandle, key pkcs11.ObjectHandle, encrypt bool, m gcmMessage, out []byte) (int, error) {
	var enc C.int
	if encrypt {
		enc = 1
	}
	if len(m.nonce) != gcmNonce {
		return 0, fmt.Errorf("%w: nonce of %d bytes", dek.ErrInvalid, len(m.nonce))
	}
	// Pointers inside the C structs are set by C, so what they point at must
	// not move: C memory.
	nonce, aad := C.CBytes(m.nonce), C.CBytes(m.aad)
	defer C.free(nonce)
	defer C.free(aad)
	n := C.kw_ulong(len(out))
	rv := C.kw_gcm_run(c.f, C.kw_ulong(s), C.kw_ulong(key), enc, (*C.kw_byte)(nonce), (*C.kw_byte)(aad), C.kw_ulong(len(m.aad)),
		bytePtr(m.text), C.kw_ulong(len(m.text)), bytePtr(out), &n)
	return clamp(n, out), rvError(rv)
}

// A gcmMessage is the input of one AES-GCM operation.
type gcmMessage struct {
	nonce, aad, text []byte
}

// sign runs a mechanism without parameters into out.
func (c cryptoki) sign(s pkcs11.SessionHandle, key pkcs11.ObjectHandle, mechanism uint, in, out []byte) (int, error) {
	n := C.kw_ulong(len(out))
	rv := C.kw_sign(c.f, C.kw_ulong(s), C.kw_ulong(key), C.kw_ulong(mechanism), bytePtr(in), C.kw_ulong(len(in)), bytePtr(out), &n)
	return clamp(n, out), rvError(rv)
}

// clamp distrusts the length that a module returns.
func clamp(n C.kw_ulong, out []byte) int {
	if n > C.kw_ulong(len(out)) {
		return 0
	}
	return int(n)
}

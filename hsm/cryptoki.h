/* SPDX-License-Identifier: Apache-2.0
 *
 * The part of PKCS#11 v2.40 that hsm/cryptoki.go calls by itself: function list
 * (order of section 3.4, pkcs11f.h) and two parameter structs, in the natural
 * alignment of Unix (section 2.1). Unused entries are untyped.
 */
#ifndef KEYWARD_CRYPTOKI_H
#define KEYWARD_CRYPTOKI_H

typedef unsigned char kw_byte;
typedef unsigned long kw_ulong;

struct kw_mechanism { kw_ulong mechanism; void *parameter; kw_ulong length; };
struct kw_oaep { kw_ulong hash, mgf, source; void *data; kw_ulong data_length; };
struct kw_gcm { kw_byte *iv; kw_ulong iv_length, iv_bits; kw_byte *aad; kw_ulong aad_length, tag_bits; };

typedef kw_ulong (*kw_init)(kw_ulong session, struct kw_mechanism *, kw_ulong key);
typedef kw_ulong (*kw_run)(kw_ulong session, kw_byte *in, kw_ulong in_length, kw_byte *out, kw_ulong *out_length);

struct kw_functions {
	kw_byte major, minor;
	kw_ulong (*C_Initialize)(void *);
	kw_ulong (*C_Finalize)(void *);
	void *C_GetInfo;
	void *C_GetFunctionList;
	void *C_GetSlotList, *C_GetSlotInfo, *C_GetTokenInfo, *C_GetMechanismList, *C_GetMechanismInfo;
	void *C_InitToken, *C_InitPIN, *C_SetPIN;
	kw_ulong (*C_OpenSession)(kw_ulong slot, kw_ulong flags, void *, void *, kw_ulong *session);
	kw_ulong (*C_CloseSession)(kw_ulong session);
	kw_ulong (*C_CloseAllSessions)(kw_ulong slot);
	void *C_GetSessionInfo, *C_GetOperationState, *C_SetOperationState;
	kw_ulong (*C_Login)(kw_ulong session, kw_ulong user, kw_byte *pin, kw_ulong length);
	void *C_Logout;
	void *C_CreateObject, *C_CopyObject, *C_DestroyObject, *C_GetObjectSize;
	void *C_GetAttributeValue, *C_SetAttributeValue;
	void *C_FindObjectsInit, *C_FindObjects, *C_FindObjectsFinal;
	kw_init C_EncryptInit;
	kw_run C_Encrypt;
	void *C_EncryptUpdate, *C_EncryptFinal;
	kw_init C_DecryptInit;
	kw_run C_Decrypt;
	void *C_DecryptUpdate, *C_DecryptFinal;
	void *C_DigestInit, *C_Digest, *C_DigestUpdate, *C_DigestKey, *C_DigestFinal;
	kw_init C_SignInit;
	kw_run C_Sign;
	void *C_SignUpdate, *C_SignFinal, *C_SignRecoverInit, *C_SignRecover;
	void *C_VerifyInit, *C_Verify, *C_VerifyUpdate, *C_VerifyFinal, *C_VerifyRecoverInit, *C_VerifyRecover;
	void *C_DigestEncryptUpdate, *C_DecryptDigestUpdate, *C_SignEncryptUpdate, *C_DecryptVerifyUpdate;
	void *C_GenerateKey;
	void *C_GenerateKeyPair, *C_WrapKey, *C_UnwrapKey, *C_DeriveKey, *C_SeedRandom, *C_GenerateRandom;
	void *C_GetFunctionStatus, *C_CancelFunction, *C_WaitForSlotEvent;
};

#endif

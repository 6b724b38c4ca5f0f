//go:build !linux

package freeing

import "os"

func open(string) (*claim, int64) { return nil, 0 }

func spare(*os.File) (int64, bool) { return 0, false }

func nameless(*os.File) bool { return false }

func alone(*os.File) bool { return false }

func stillAlone(*os.File) bool { return false }
